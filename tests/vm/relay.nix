# A relay in front of a collector: exporters talk to the relay, both of them get everything.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host;
  rule = name: port: options: {
    inherit name options;
    key = {
      address = "10.1.0.2";
      inherit port;
    };
    upstream = [ { address = "10.1.0.3"; } ];
  };
in
{
  name = "udplb-relay";
  globalTimeout = 900;

  nodes = {
    collector = host "10.1.0.3";
    exporter = host "10.1.0.1";
    relay = {
      imports = [ (host "10.1.0.2") ];
      networking.firewall.enable = true;
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        openFirewall = true;
        rules = [
          (rule "flows" 2055 { source = "preserve"; })
          (rule "traps" "162-163" { })
          (rule "forwarded" 514 { tc_action = "block"; })
        ];
      };
    };
  };

  testScript = builtins.readFile ./relay.py;
}
