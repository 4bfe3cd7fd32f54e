# What a rebuild, a bad file, a late interface, a stop and a reboot do to traffic.
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
in
{
  name = "udplb-reload";
  globalTimeout = 1800;

  nodes = {
    client = host "10.1.0.1";
    relay = {
      imports = [ (host "10.1.0.2") ];
      services.udplb = {
        enable = true;
        interfaces = lib.mkDefault [ "eth1" ];
        defaults.tc_action = lib.mkDefault "block";
        rules = lib.mkDefault [ (to "10.1.0.3") ];
      };

      specialisation = {
        moved.configuration.services.udplb.rules = [ (to "10.1.0.4") ];
        late.configuration.services.udplb.interfaces = [
          "eth1"
          "late0"
        ];
        repaired.configuration.services.udplb.repairInterval = "2s";
        kept.configuration.services.udplb.keepOnStop = true;
        file.configuration.services.udplb = {
          configFile = "/var/lib/udplb.yaml";
          defaults.tc_action = null;
          rules = [ ];
        };
        off.configuration.services.udplb.enable = lib.mkForce false;
      };
    };
    up1 = host "10.1.0.3";
    up2 = host "10.1.0.4";
  };

  testScript = builtins.readFile ./reload.py;
}
