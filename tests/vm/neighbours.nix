# Upstreams that change their hardware address, go away and come back, and what udplb arpd makes of it.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host;
in
{
  name = "udplb-neighbours";
  globalTimeout = 1200;

  nodes = {
    client = host "10.1.0.1";
    relay = {
      imports = [ (host "10.1.0.2") ];
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        rules = [
          {
            name = "copied";
            key = {
              address = "10.1.0.2";
              port = 2055;
            };
            upstream = [ { address = "10.1.0.3"; } ];
          }
        ];
      };
    };
    up = host "10.1.0.3";
  };

  testScript = builtins.readFile ./neighbours.py;
}
