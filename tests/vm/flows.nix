# A balancer by Maglev: weights, drain and health move the flows that they must, and a Prometheus sees it.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host;
in
{
  name = "udplb-flows";
  globalTimeout = 900;

  nodes = {
    client = host "10.1.0.1";
    lb = {
      imports = [ (host "10.1.0.2") ];
      networking.firewall.enable = true;
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        metrics.enable = true;
        defaults = {
          tc_action = "block";
          health = "neighbour";
        };
        rules = [
          {
            name = "metrics";
            key = {
              address = "10.1.0.2";
              port = 8125;
            };
            options.source = "preserve";
            upstream = [
              {
                name = "heavy";
                address = "10.1.0.3";
                weight = 3;
              }
              {
                name = "light";
                address = "10.1.0.4";
              }
            ];
          }
        ];
      };
    };
    heavy = host "10.1.0.3";
    light = host "10.1.0.4";
  };

  testScript = builtins.readFile ./flows.py;
}
