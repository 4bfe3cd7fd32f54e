# Another version of the package, and a change that is rolled back: under traffic, reload and reboot.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host;
  to = address: {
    name = "service";
    key = {
      address = "10.1.0.2";
      port = 514;
    };
    upstream = [ { inherit address; } ];
  };
  # The same program, which takes its object for another one.
  next =
    package:
    pkgs.runCommand "udplb-next" { meta.mainProgram = "udplb"; } ''
      mkdir -p $out/bin
      digests=$(grep -aoE '[0-9a-f]{64}' ${package}/bin/udplb | grep -v -e 01020304 -e 33343536 -e 65666768 | sort -u)
      for digest in $digests; do
        edits="''${edits:-}s/$digest/$(echo "$digest" | tr 0-9a-f 1-9a-f0)/g;"
      done
      sed "$edits" ${package}/bin/udplb > $out/bin/udplb
      chmod +x $out/bin/udplb
    '';
in
{
  name = "udplb-upgrade";
  globalTimeout = 900;

  nodes = {
    client = host "10.1.0.1";
    relay =
      { config, ... }:
      {
        imports = [ (host "10.1.0.2") ];
        services.udplb = {
          enable = true;
          interfaces = [ "eth1" ];
          defaults.tc_action = "block";
          rules = lib.mkDefault [ (to "10.1.0.3") ];
        };
        specialisation = {
          next.configuration.services.udplb.package = lib.mkForce (next config.services.udplb.package);
          moved.configuration.services.udplb.rules = [ (to "10.1.0.4") ];
          confirmed.configuration.services.udplb = {
            confirm = 60;
            rules = [ (to "10.1.0.4" // { name = "confirmed"; }) ];
          };
          doubted.configuration.services.udplb = {
            confirm = 2;
            rules = [ (to "10.1.0.4" // { name = "doubted"; }) ];
          };
        };
      };
    up1 = host "10.1.0.3";
    up2 = host "10.1.0.4";
  };

  testScript = builtins.readFile ./upgrade.py;
}
