# The machines of the scenarios.
{ pkgs, lib }:
rec {
  # The only interface is in the network that all share.
  host =
    address:
    machine {
      eth1 = {
        vlan = 1;
        inherit address;
      };
    };

  # The same with IPv6.
  host6 =
    address6:
    machine {
      eth1 = {
        vlan = 1;
        inherit address6;
      };
    };

  # links: interface -> { vlan, address, address6, routes }
  machine = links: {
    environment.etc."udp.py".source = ./udp.py;
    environment.systemPackages = [
      pkgs.iproute2
      pkgs.python3
    ];
    virtualisation.interfaces = lib.mapAttrs (_: link: { inherit (link) vlan; }) links;
    networking = {
      useDHCP = false;
      # The end points of a scenario are not what is tested: who wants the firewall says so.
      firewall.enable = lib.mkDefault false;
      interfaces = lib.mapAttrs (_: link: {
        ipv4.addresses = lib.optional (link ? address) {
          inherit (link) address;
          prefixLength = 24;
        };
        ipv6.addresses = lib.optional (link ? address6) {
          address = link.address6;
          prefixLength = 64;
        };
        ipv4.routes = link.routes or [ ];
      }) links;
    };
  };
}
