# One service address, two upstreams: which of them gets what.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host;
in
{
  name = "udplb-balance";
  globalTimeout = 900;

  nodes = {
    client = host "10.1.0.1";
    lb = {
      imports = [ (host "10.1.0.2") ];
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        defaults = {
          tc_action = "block";
          hash = "modulo";
        };
        rules = [
          {
            name = "by-port";
            key = {
              address = "10.1.0.2";
              port = 5000;
            };
            options.strategy = "src-port";
            upstream = [
              {
                address = "10.1.0.3";
                port = 6000;
              }
              {
                address = "10.1.0.4";
                port = 6000;
              }
            ];
          }
          {
            name = "by-address";
            key = {
              address = "10.1.0.2";
              port = 5001;
            };
            options.strategy = "src-ip";
            upstream = [
              { address = "10.1.0.3"; }
              { address = "10.1.0.4"; }
            ];
          }
        ];
      };
    };
    up1 = host "10.1.0.3";
    up2 = host "10.1.0.4";
  };

  testScript = builtins.readFile ./balance.py;
}
