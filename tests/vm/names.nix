# Receivers by name, under the units' sandbox: known at once, later, moved, and what stops meanwhile.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host;
in
{
  name = "udplb-names";
  globalTimeout = 900;

  nodes = {
    client = host "10.1.0.1";
    relay = {
      imports = [ (host "10.1.0.2") ];
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        defaults.tc_action = "block";
        rules = [
          {
            name = "replicated";
            key = {
              address = "10.1.0.2";
              port = 514;
            };
            options.mode = "replicate";
            options.source = "vip";
            upstream = [
              { address = "first"; }
              { address = "10.1.0.4"; }
              { address = "later.test"; }
            ];
          }
        ];
      };

      specialisation.off.configuration.services.udplb.enable = lib.mkForce false;
    };
    first = host "10.1.0.3";
    second = host "10.1.0.4";
    third = host "10.1.0.5";
  };

  testScript = builtins.readFile ./names.py;
}
