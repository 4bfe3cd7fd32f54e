# systemd-networkd and nftables beside udplb, and a bridge that one rebuild both makes and uses.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host machine;
  rule = port: options: {
    inherit options;
    key = {
      address = "any";
      inherit port;
    };
    upstream = [ { address = "10.1.0.3"; } ];
  };
in
{
  name = "udplb-networkd";
  globalTimeout = 900;

  nodes = {
    client = host "10.1.0.1";
    guest = machine {
      eth1 = {
        vlan = 2;
        address = "10.2.0.1";
      };
    };
    relay = {
      imports = [
        (machine {
          eth1 = {
            vlan = 1;
            address = "10.1.0.2";
          };
          eth2.vlan = 2;
        })
      ];
      networking = {
        useNetworkd = true;
        firewall.enable = true;
        nftables.enable = true;
        nftables.tables.guard = {
          family = "inet";
          content = ''
            chain prerouting {
              type filter hook prerouting priority -300;
              udp dport 515 drop
            }
          '';
        };
      };
      services.udplb = {
        enable = true;
        interfaces = lib.mkDefault [ "eth1" ];
        openFirewall = true;
        rules = [
          (rule 514 { tc_action = "block"; })
          (rule 515 { })
          (rule 516 { })
        ];
      };

      specialisation.bridged.configuration = {
        networking = {
          bridges.br0.interfaces = [ "eth2" ];
          interfaces.br0.ipv4.addresses = [
            {
              address = "10.2.0.2";
              prefixLength = 24;
            }
          ];
        };
        services.udplb.interfaces = [
          "eth1"
          "br0"
        ];
      };
    };
    up = machine {
      eth1 = {
        vlan = 1;
        address = "10.1.0.3";
        routes = [
          {
            address = "10.2.0.0";
            prefixLength = 24;
            via = "10.1.0.2";
          }
        ];
      };
    };
  };

  testScript = builtins.readFile ./networkd.py;
}
