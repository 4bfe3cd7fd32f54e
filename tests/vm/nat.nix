# Translated replies: the upstreams know nothing of the clients' network, and answer to the balancer.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) machine;
  server =
    address:
    machine {
      eth1 = {
        vlan = 2;
        inherit address;
      };
    };
in
{
  name = "udplb-nat";
  globalTimeout = 900;

  nodes = {
    client = machine {
      eth1 = {
        vlan = 1;
        address = "10.1.0.1";
      };
    };
    balancer = {
      imports = [
        (machine {
          eth1 = {
            vlan = 1;
            address = "10.1.0.2";
          };
          eth2 = {
            vlan = 2;
            address = "10.2.0.2";
          };
        })
      ];
      # The kernel's routing finds the way back to clients.
      boot.kernel.sysctl."net.ipv4.ip_forward" = 1;
      # Answers pass before the firewall sees them.
      networking.firewall.enable = true;
      services.udplb = {
        enable = true;
        interfaces = [
          "eth1"
          "eth2"
        ];
        flows = {
          entries = 4096;
          ports = "20000-29999";
        };
        rules = [
          {
            name = "dns";
            key = {
              address = "10.1.0.2";
              port = 53;
            };
            options = {
              tc_action = "block";
              mode = "balance";
              reply = "nat";
            };
            upstream = [
              {
                name = "one";
                address = "10.2.0.11";
                port = 5353;
              }
              {
                name = "two";
                address = "10.2.0.12";
                port = 5353;
              }
            ];
          }
        ];
      };
    };
    one = server "10.2.0.11";
    two = server "10.2.0.12";
  };

  testScript = builtins.readFile ./nat.py;
}
