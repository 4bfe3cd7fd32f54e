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

  # links: interface -> { vlan, address, routes }
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
        ipv4.addresses = [
          {
            inherit (link) address;
            prefixLength = 24;
          }
        ];
        ipv4.routes = link.routes or [ ];
      }) links;
    };
  };
}
