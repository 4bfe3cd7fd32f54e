# Interfaces for `announce`, and BIRD's part.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.udplb;
  interfaces = [
    "anycast0"
    "anycast1"
  ];
  ip = "${pkgs.iproute2}/bin/ip";

  # NixOS 25.05 renamed services.bird2.
  bird = if options.services ? bird && options.services.bird ? package then "bird" else "bird2";
  hasBird = options.services ? ${bird};
  announce = lib.filterAttrs (_: value: value != null) cfg.announce;
  file = pkgs.writeText "announce.json" (
    builtins.toJSON {
      version = 1;
      inherit announce;
      rules = [ ];
    }
  );
  neighbors = lib.concatMapStringsSep " " (
    n: "--neighbor ${n.address}=${toString n.as}"
  ) cfg.anycast.bird.neighbors;
  part =
    pkgs.runCommand "udplb-bird.conf"
      {
        nativeBuildInputs = [ cfg.package ];
      }
      ''
        udplb announce --bird --as ${toString cfg.anycast.bird.as} ${neighbors} --file ${file} >"$out"
      '';

  as = mkOption {
    type = types.ints.u32;
    example = 65001;
    description = "Number of the autonomous system.";
  };
in
{
  options.services.udplb.anycast = {
    enable = lib.mkEnableOption "the dummy interfaces anycast0 and anycast1 for {option}`services.udplb.announce`";

    bird = mkOption {
      type = types.nullOr (
        types.submodule {
          options = {
            inherit as;
            routerId = mkOption {
              type = types.str;
              example = "10.0.0.11";
              description = "BIRD's router id, an IPv4 address of this host alone.";
            };
            neighbors = mkOption {
              type = types.nonEmptyListOf (
                types.submodule {
                  options = {
                    inherit as;
                    address = mkOption {
                      type = types.str;
                      example = "10.0.0.1";
                      description = "IP address of the router.";
                    };
                  };
                }
              );
              example = [
                {
                  address = "10.0.0.1";
                  as = 64999;
                }
              ];
              description = "Routers that the addresses are announced to, with BFD.";
            };
          };
        }
      );
      default = null;
      example = {
        as = 65001;
        routerId = "10.0.0.11";
        neighbors = [
          {
            address = "10.0.0.1";
            as = 64999;
          }
        ];
      };
      description = "Has BIRD announce the addresses. Unset: the routing daemon is configured elsewhere.";
    };
  };

  config = lib.mkIf (cfg.enable && cfg.anycast.enable) (
    lib.mkMerge [
      {
        services.udplb.announce = lib.mkIf (cfg.configFile == null) {
          interface = lib.mkDefault (lib.elemAt interfaces 0);
          last_resort = lib.mkDefault (lib.elemAt interfaces 1);
        };

        assertions = [
          {
            assertion = cfg.anycast.bird == null || hasBird;
            message = "services.udplb.anycast.bird: this NixOS has neither services.bird nor services.bird2.";
          }
          {
            assertion = cfg.anycast.bird == null || cfg.announce != null;
            message = "services.udplb.anycast.bird: needs services.udplb.announce; a configFile is not read here.";
          }
        ];

        boot.kernelModules = [ "dummy" ];

        systemd.services.udplb-anycast = {
          description = "interfaces of addresses that udplb announces";
          wantedBy = [ "multi-user.target" ];
          before = [ "udplb-arpd.service" ];
          serviceConfig = import ./hardening.nix // {
            Type = "oneshot";
            RemainAfterExit = true;
            # "-": the interface may be there already.
            ExecStart = lib.concatMap (i: [
              "-${ip} link add ${i} type dummy"
              "${ip} link set ${i} up"
            ]) interfaces;
            ExecStop = map (i: "-${ip} link delete ${i}") interfaces;
            CapabilityBoundingSet = [ "CAP_NET_ADMIN" ];
            ProtectKernelTunables = true;
            RestrictAddressFamilies = [ "AF_NETLINK" ];
            SystemCallFilter = [ "@system-service" ];
          };
        };

        # A shutdown stops udplb first: it withdraws, and the routing daemon still tells the routers.
        systemd.services.udplb.after = [
          "bird.service"
          "bird2.service"
          "frr.service"
          "udplb-anycast.service"
        ];
      }
      (lib.optionalAttrs hasBird {
        services.${bird} = lib.mkIf (cfg.anycast.bird != null && cfg.announce != null) {
          enable = true;
          config = ''
            router id ${cfg.anycast.bird.routerId};
            protocol device { }
            include "${part}";
          '';
        };
      })
    ]
  );
}
