# Direct replies: one upstream in the balancer's network, and one behind a router, which takes a tunnel off.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) machine;
  via = address: via: [
    {
      inherit address via;
      prefixLength = 24;
    }
  ];
  # An upstream has the address of the key, and tells nobody.
  quiet = {
    boot.kernel.sysctl = {
      "net.ipv4.conf.all.arp_ignore" = 1;
      "net.ipv4.conf.all.arp_announce" = 2;
    };
  };
in
{
  name = "udplb-direct";
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
            routes = via "10.3.0.0" "10.2.0.254";
          };
        })
      ];
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
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
              reply = "direct";
              via = "link";
            };
            upstream = [
              {
                name = "near";
                address = "10.2.0.11";
              }
              {
                name = "far";
                address = "10.3.0.12";
                via = "gue";
              }
            ];
          }
        ];
      };
    };
    gateway = {
      imports = [
        (machine {
          eth1 = {
            vlan = 1;
            address = "10.1.0.254";
          };
          eth2 = {
            vlan = 2;
            address = "10.2.0.254";
          };
          eth3 = {
            vlan = 3;
            address = "10.3.0.254";
          };
        })
      ];
      boot.kernel.sysctl."net.ipv4.ip_forward" = 1;
    };
    near = {
      imports = [
        quiet
        (machine {
          eth1 = {
            vlan = 1;
            address = "10.1.0.11";
          };
          eth2 = {
            vlan = 2;
            address = "10.2.0.11";
          };
        })
      ];
    };
    far = {
      imports = [
        quiet
        (machine {
          eth1 = {
            vlan = 3;
            address = "10.3.0.12";
            routes = via "10.1.0.0" "10.3.0.254" ++ via "10.2.0.0" "10.3.0.254";
          };
        })
      ];
      # Outer headers are gone before the firewall sees a packet.
      networking.firewall = {
        enable = true;
        allowedUDPPorts = [ 53 ];
      };
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        decap = {
          from = [ "10.2.0.2" ];
          via = [ "gue" ];
        };
      };
    };
  };

  testScript = builtins.readFile ./direct.py;
}
