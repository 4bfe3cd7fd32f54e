# Several receivers of each datagram, with IPv6: replicas, a mirror, a sample, and a group of both.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) host6;
  to = number: { address = "fd00:1::${toString number}"; };
  key = port: {
    address = "fd00:1::2";
    inherit port;
  };
in
{
  name = "udplb-copies";
  globalTimeout = 900;

  nodes = {
    exporter = host6 "fd00:1::1";
    relay = {
      imports = [ (host6 "fd00:1::2") ];
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        defaults.source = "preserve";
        rules = [
          {
            name = "replicated";
            key = key 2055;
            options.mode = "replicate";
            upstream = [
              (to 3)
              (to 4 // { port = 9995; })
            ];
          }
          {
            name = "mirrored";
            key = key 4739;
            options.tc_action = "block";
            upstream = [ (to 3) ];
            mirror = [ (to 4 // { source = "vip"; }) ];
          }
        ];
      };
    };
    first = host6 "fd00:1::3";
    second = host6 "fd00:1::4";
  };

  testScript = builtins.readFile ./copies.py;
}
