# Evaluates the module, the package and the VM tests with nothing of nixpkgs but its lib/.
#
#   nix-instantiate --eval --strict --json eval.nix --argstr libPath DIR -A case.NAME
{
  libPath, # holds lib/default.nix
}:
let
  root = ../..;
  lib = import (libPath + "/lib");
  stubs = import ./stubs.nix { inherit lib; };
  inherit (stubs) pkgs;

  package = pkgs.callPackage (root + "/nixos/package.nix") { };
  modules = [
    stubs.base
    # twice, as by two flakes
    (root + "/nixos/module.nix")
    (root + "/nixos/module.nix")
  ];

  word = v: if builtins.isBool v then lib.boolToString v else toString v;
  body = lib.mapAttrsToList (n: v: lib.concatMapStrings (x: "${n}=${word x}\n") (lib.toList v));
  list = n: l: lib.optional (l != [ ]) "${n}=${toString l}\n";
  unit =
    type: u: extra:
    lib.concatStrings (
      [ "[Unit]\n" ]
      ++ [ "Description=${u.description}\n" ]
      ++ list "Documentation" u.documentation
      ++ list "Wants" u.wants
      ++ list "Requires" u.requires
      ++ list "Requisite" u.requisite
      ++ list "BindsTo" u.bindsTo
      ++ list "PartOf" u.partOf
      ++ list "Before" u.before
      ++ list "After" u.after
      ++ list "Conflicts" u.conflicts
      ++ body u.unitConfig
      ++ [ "\n[${type}]\n" ]
      ++ extra
      ++ [ "\n[Install]\n" ]
      ++ list "WantedBy" u.wantedBy
      ++ list "RequiredBy" u.requiredBy
    );
  service =
    s:
    unit "Service" s (
      # tells NixOS how to treat the unit when it changes
      lib.optional s.reloadIfChanged "X-ReloadIfChanged=true\n" ++ body s.serviceConfig
    );
  timer = t: unit "Timer" t (body t.timerConfig);

  # A file of /etc: its text or where it lies, and what the build runs to check it.
  etcFile =
    { source, ... }:
    let
      origin = source.env.source or source;
    in
    {
      target = lib.optionalString (lib.isDerivation source) source.outPath;
      text = origin.text or null;
      # one of ours, as it is
      path = lib.optionalString (builtins.isPath origin) (
        lib.removePrefix "${toString root}/" (toString origin)
      );
      check = source.script or "";
    };

  # The files that NixOS makes of networking.interfaces and networking.bridges for systemd-networkd.
  networkd =
    config:
    let
      cidr = a: "${a.address}/${toString a.prefixLength}";
      ports = lib.concatMapAttrs (
        bridge: b: lib.genAttrs b.interfaces (_: bridge)
      ) config.networking.bridges;
      network =
        name: own:
        lib.nameValuePair "40-${name}.network" (
          lib.concatLines (
            [
              "[Match]"
              "Name=${name}"
              "[Network]"
              "DHCP=no"
            ]
            ++ lib.optional (ports ? ${name}) "Bridge=${ports.${name}}"
            ++ map (a: "Address=${cidr a}") (own.ipv4.addresses ++ own.ipv6.addresses)
          )
        );
      bridge = name: _: lib.nameValuePair "40-${name}.netdev" "[NetDev]\nName=${name}\nKind=bridge\n";
    in
    lib.mapAttrs' network config.networking.interfaces
    // lib.mapAttrs' bridge config.networking.bridges;

  summary = config: {
    failed = map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);
    inherit (config) warnings;
    inherit (config.boot) kernelModules;
    kernelConfig = map (c: c.configLine) config.system.requiredKernelConfig;
    etc = lib.mapAttrs (_: etcFile) config.environment.etc;
    units =
      lib.mapAttrs' (n: s: lib.nameValuePair "${n}.service" (service s)) config.systemd.services
      // lib.mapAttrs' (n: t: lib.nameValuePair "${n}.timer" (timer t)) config.systemd.timers;
    # what a test makes of the package
    packages =
      let
        inherit (config.services.udplb) package;
      in
      lib.optionalAttrs (package ? script) { ${package.outPath} = package.script; };
    networkd = lib.optionalAttrs (config.networking.useNetworkd or false) (networkd config);
    firewall = {
      inherit (config.networking.firewall) enable;
      nftables = config.networking.nftables.enable or false;
      tables = lib.mapAttrsToList (
        name: t: "table ${t.family} ${name} {\n${t.content}\n}\n"
      ) config.networking.nftables.tables or { };
      open = lib.mapAttrs (_: o: o.allowedUDPPorts ++ o.allowedUDPPortRanges) (
        config.networking.firewall.interfaces // { "" = config.networking.firewall; }
      );
    };
  };

  evalCase =
    case:
    summary
      (lib.evalModules {
        class = "nixos";
        modules = modules ++ [ case.config ];
      }).config;

  evalTest =
    file:
    let
      test =
        (lib.evalModules {
          modules = [
            file
            {
              options = lib.mapAttrs (_: type: lib.mkOption { inherit type; }) {
                name = lib.types.str;
                globalTimeout = lib.types.int;
                testScript = lib.types.str;
                nodes = lib.types.lazyAttrsOf (
                  lib.types.submoduleWith {
                    class = "nixos";
                    modules = modules ++ [ stubs.testMachine ];
                  }
                );
              };
              config._module.args = { inherit pkgs; };
            }
          ];
        }).config;
      links =
        config:
        lib.mapAttrs (
          name: link:
          let
            own = config.networking.interfaces.${name};
            both = f: f own.ipv4 ++ f own.ipv6;
            cidr = a: "${a.address}/${toString a.prefixLength}";
          in
          {
            inherit (link) vlan;
            addresses = both (f: map cidr f.addresses);
            routes = both (f: map (r: "${cidr r} via ${r.via}") f.routes);
          }
        ) config.virtualisation.interfaces;
      node =
        config:
        summary config
        // {
          links = links config;
          inherit (config.boot.kernel) sysctl;
          specialisations = lib.mapAttrs (_: s: summary s.configuration) config.specialisation;
        };
    in
    {
      inherit (test) name globalTimeout testScript;
      nodes = lib.mapAttrs (_: node) test.nodes;
    };

  cases =
    import ./cases/good.nix
    // lib.mapAttrs' (n: lib.nameValuePair "bad-${n}") (import ./cases/bad.nix lib);

  # The names of the rules' options and what they may be chosen from.
  words =
    options:
    lib.concatLists (
      lib.mapAttrsToList (name: o: [ name ] ++ (if lib.isOption o then ofType o.type else words o)) (
        removeAttrs options [
          "_module"
          "_freeformOptions"
        ]
      )
    );
  ofType =
    type:
    (type.functor.payload.values or [ ])
    ++ words (type.getSubOptions [ ])
    ++ lib.concatMap ofType (lib.attrValues (removeAttrs (type.nestedTypes or { }) [ "freeformType" ]));
  udplbOptions =
    (lib.evalModules {
      class = "nixos";
      inherit modules;
    }).options.services.udplb;
in
{
  # each on its own, so that an error is seen with its text
  case = lib.mapAttrs (_: evalCase) cases;
  expect = lib.mapAttrs (_: c: c.expect) cases;
  test = lib.mapAttrs (_: evalTest) (import (root + "/tests/vm") lib);
  escaped = lib.genAttrs [ "br-lan" "eth0.100" "wg_0" "a+b" ] (
    i: stubs.utils.escapeSystemdPath "/sys/subsystem/net/devices/${i}"
  );
  words = words {
    inherit (udplbOptions)
      announce
      decap
      defaults
      flows
      interfaces
      rules
      ;
  };
  # as the manual lists them
  options = map (o: {
    inherit (o) name;
    description = o.description or null != null;
    example = o ? example;
  }) (lib.filter (o: o.visible && !o.internal) (lib.optionAttrSetToDocList udplbOptions));
  package = {
    inherit (package.args) pname version;
    src = "${package.args.src}";
  };
}
