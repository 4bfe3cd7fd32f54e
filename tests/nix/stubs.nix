# Stand-ins for what the module, the package and the VM tests take from nixpkgs.
# Every option is declared with a real type, so that a wrong name or value fails
# here as it would on NixOS. Nothing here comes from nixpkgs but `lib`.
{
  lib,
  system ? "x86_64-linux",
  # How a derivation is made. Plain attributes suffice for evaluation; a flake wants real ones.
  mkDrv ?
    { name, ... }@args:
    args
    // {
      type = "derivation";
      outPath = "/stub/${args.pname or name}";
      drvPath = "/stub/${name}.drv";
    },
}:
let
  inherit (lib) mkOption types;

  digest = text: builtins.substring 0 8 (builtins.hashString "sha256" text);
  drv = name: extra: mkDrv ({ inherit name; } // extra);

  platform = {
    inherit system;
    isLinux = true;
    canExecute = other: other.system == system;
    rust.cargoShortTarget = "stub";
  };

  pkgs = rec {
    inherit lib system;
    stdenv = {
      hostPlatform = platform;
      buildPlatform = platform;
      cc = drv "cc" { };
    };
    buildPackages = { inherit stdenv; };
    # What the module writes stays readable (.text, and .env with .script) and has
    # a path of its own, so that other contents make another unit.
    writeText =
      name: text:
      drv name {
        inherit text;
        pname = "${digest text}-${name}";
      };
    runCommand =
      name: env: script:
      drv name {
        inherit env script;
        meta = env.meta or { };
        pname = "${digest (script + toString (env.source or ""))}-${name}";
      };
    writeShellApplication = { name, ... }@args: drv name (args // { meta.mainProgram = name; });
    mkShell = drv "shell";
    formats.yaml = _: {
      type =
        let
          value =
            types.nullOr (
              types.oneOf [
                types.bool
                types.int
                types.float
                types.str
                types.path
                (types.attrsOf value)
                (types.listOf value)
              ]
            )
            // {
              description = "YAML value";
            };
        in
        value;
      generate = name: value: writeText name (builtins.toJSON value);
    };
    rustPlatform.buildRustPackage =
      f:
      let
        args = f { finalPackage = package; };
        package = drv "${args.pname}-${args.version}" (
          removeAttrs args [ "passthru" ]
          // args.passthru or { }
          // args.env
          // {
            inherit args;
            overrideAttrs = over: rustPlatform.buildRustPackage (final: f final // over);
          }
        );
      in
      package;
    llvmPackages.clang-unwrapped = drv "clang" { };
    python3Packages.pyflakes = drv "pyflakes" { };
    testers.runNixOSTest = test: drv "vm-test-run" { inherit test; };
    callPackage =
      file: over:
      let
        f = import file;
      in
      f (builtins.intersectAttrs (builtins.functionArgs f) pkgs // over);
  }
  // lib.genAttrs [
    "cargo"
    "clippy"
    "coreutils"
    "deadnix"
    "diffutils"
    "elfutils"
    "gnused"
    "installShellFiles"
    "iproute2"
    "linuxHeaders"
    "mypy"
    "nftables"
    "nix"
    "nixfmt"
    "nixfmt-tree"
    "pkg-config"
    "python3"
    "rustfmt"
    "systemd"
    "util-linux"
    "versionCheckHook"
    "zlib"
  ] (name: drv name { });

  # as nixos/lib/utils.nix describes them
  utils = rec {
    # run.py compares this with systemd-escape
    escapeSystemdPath =
      path:
      let
        plain = lib.removePrefix "/" path;
        escape =
          c:
          if c == "/" then
            "-"
          else if builtins.match "[A-Za-z0-9:_.]" c != null then
            c
          else
            lib.strings.escapeC [ c ] c;
      in
      lib.stringAsChars escape plain;
    escapeSystemdExecArg =
      arg: lib.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON "${toString arg}");
    escapeSystemdExecArgs = lib.concatMapStringsSep " " escapeSystemdExecArg;
  };

  option = type: default: mkOption { inherit type default; };
  flag = option types.bool;
  names = option (types.listOf types.str) [ ];
  lines = option types.lines "";

  unitValue = types.oneOf [
    types.bool
    types.int
    types.float
    types.str
    types.path
    types.package
  ];
  section = option (types.attrsOf (types.either unitValue (types.listOf unitValue))) { };

  unitOptions = {
    enable = flag true;
    description = option types.singleLineStr "";
    documentation = names;
    wantedBy = names;
    requiredBy = names;
    wants = names;
    requires = names;
    requisite = names;
    bindsTo = names;
    partOf = names;
    before = names;
    after = names;
    conflicts = names;
    unitConfig = section;
  };
  service = types.submodule {
    options = unitOptions // {
      serviceConfig = section;
      environment = option (types.attrsOf (types.nullOr types.str)) { };
      path = option (types.listOf (types.either types.package types.str)) [ ];
      script = lines;
      reloadIfChanged = flag false;
    };
  };
  timer = types.submodule {
    options = unitOptions // {
      timerConfig = section;
    };
  };

  ports = option (types.listOf types.port) [ ];
  portRanges = option (types.listOf (types.attrsOf types.port)) [ ];
  openPorts = {
    allowedTCPPorts = ports;
    allowedTCPPortRanges = portRanges;
    allowedUDPPorts = ports;
    allowedUDPPortRanges = portRanges;
  };

  base =
    { extendModules, ... }:
    {
      options = {
        assertions = option (types.listOf (
          types.submodule {
            options = {
              assertion = mkOption { type = types.bool; };
              message = mkOption { type = types.str; };
            };
          }
        )) [ ];
        warnings = names;
        environment.systemPackages = option (types.listOf types.package) [ ];
        environment.etc = option (types.attrsOf (
          types.submodule (
            { config, name, ... }:
            {
              options = {
                text = option (types.nullOr types.lines) null;
                source = mkOption { type = types.path; };
              };
              config.source = lib.mkIf (config.text != null) (pkgs.writeText name config.text);
            }
          )
        )) { };
        boot.kernelModules = names;
        system.requiredKernelConfig = option (types.listOf types.attrs) [ ];
        lib = option (types.attrsOf types.attrs) { };
        boot.kernel.sysctl = option (types.attrsOf unitValue) { };
        networking.firewall = openPorts // {
          enable = flag true;
          interfaces = option (types.attrsOf (types.submodule { options = openPorts; })) { };
        };
        systemd.services = option (types.attrsOf service) { };
        systemd.timers = option (types.attrsOf timer) { };
        specialisation = option (types.attrsOf (
          types.submodule {
            options.configuration = mkOption {
              default = { };
              inherit (extendModules { modules = [ { specialisation = lib.mkForce { }; } ]; }) type;
            };
          }
        )) { };
      };
      config.lib.kernelConfig = lib.genAttrs [ "isYes" "isEnabled" ] (
        is: option: {
          configLine = "CONFIG_${option} ${is}";
        }
      );
      config._module.args = { inherit pkgs utils; };
    };

  family = {
    addresses = option (types.listOf (
      types.submodule {
        options = {
          address = mkOption { type = types.str; };
          prefixLength = mkOption { type = types.ints.between 0 128; };
        };
      }
    )) [ ];
    routes = option (types.listOf (
      types.submodule {
        options = {
          address = mkOption { type = types.str; };
          prefixLength = mkOption { type = types.ints.between 0 128; };
          via = mkOption { type = types.str; };
        };
      }
    )) [ ];
  };

  # what only the machines of a VM test have
  testMachine = {
    options = {
      virtualisation.interfaces = option (types.attrsOf (
        types.submodule {
          options.vlan = mkOption { type = types.ints.unsigned; };
        }
      )) { };
      networking = {
        useDHCP = flag true;
        useNetworkd = flag false;
        bridges = option (types.attrsOf (
          types.submodule { options.interfaces = option (types.listOf types.str) [ ]; }
        )) { };
        nftables = {
          enable = flag false;
          tables = option (types.attrsOf (
            types.submodule {
              options.family = mkOption { type = types.str; };
              options.content = mkOption { type = types.lines; };
            }
          )) { };
        };
        interfaces = option (types.attrsOf (
          types.submodule {
            options.ipv4 = family;
            options.ipv6 = family;
          }
        )) { };
      };
    };
  };
in
{
  inherit
    base
    pkgs
    testMachine
    utils
    ;
}
