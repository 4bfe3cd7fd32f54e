# A forwarder: the upstream is in another network, behind a gateway.
{ pkgs, lib, ... }:
let
  inherit (import ./machines.nix { inherit pkgs lib; }) machine;
  via = address: via: [
    {
      inherit address via;
      prefixLength = 24;
    }
  ];
in
{
  name = "udplb-forward";
  globalTimeout = 900;

  nodes = {
    client = machine {
      eth1 = {
        vlan = 1;
        address = "10.1.0.1";
      };
    };
    relay = {
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
      # A relay is no router.
      boot.kernel.sysctl."net.ipv4.ip_forward" = 0;
      services.udplb = {
        enable = true;
        interfaces = [ "eth1" ];
        defaults.tc_action = "block";
        rules = [
          {
            name = "far";
            key = {
              address = "10.1.0.2";
              port = 514;
            };
            upstream = [ { address = "10.3.0.3"; } ];
          }
          {
            name = "near";
            key = {
              address = "10.1.0.2";
              port = 515;
            };
            options.source = "preserve";
            upstream = [
              {
                address = "10.2.0.3";
                port = 1515;
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
            vlan = 2;
            address = "10.2.0.254";
            routes = via "10.1.0.0" "10.2.0.2";
          };
          eth2 = {
            vlan = 3;
            address = "10.3.0.254";
          };
        })
      ];
      boot.kernel.sysctl."net.ipv4.ip_forward" = 1;
    };
    far = machine {
      eth1 = {
        vlan = 3;
        address = "10.3.0.3";
        routes = via "10.1.0.0" "10.3.0.254";
      };
    };
    near = machine {
      eth1 = {
        vlan = 2;
        address = "10.2.0.3";
        routes = via "10.1.0.0" "10.2.0.2";
      };
    };
  };

  testScript = builtins.readFile ./forward.py;
}
