{
  description = "udplb: relays, forwards and balances UDP in the Linux kernel's traffic control layer";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "aarch64-linux"
        "x86_64-linux"
      ];
      forAllSystems = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      udplbFor =
        pkgs: pkgs.callPackage ./nixos/package.nix { commit = self.rev or self.dirtyRev or null; };
      # With a key it may be imported twice, also from two copies of this flake.
      module = {
        key = "udplb/nixos/module.nix";
        _class = "nixos";
        imports = [ ./nixos/module.nix ];
      };
    in
    {
      overlays.default = final: _prev: { udplb = udplbFor final; };

      packages = forAllSystems (pkgs: rec {
        udplb = udplbFor pkgs;
        default = udplb;
      });

      nixosModules = {
        default = module;
        udplb = module;
      };

      devShells = forAllSystems (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ (udplbFor pkgs) ];
          packages = [
            pkgs.clippy
            pkgs.deadnix
            pkgs.iproute2
            pkgs.nftables
            pkgs.nixfmt
            pkgs.rustfmt
          ];
          C_INCLUDE_PATH = "${pkgs.linuxHeaders}/include";
        };
      });

      formatter = forAllSystems (pkgs: pkgs.nixfmt-tree);

      apps = forAllSystems (
        pkgs:
        let
          # with the end points of the demo
          build = (udplbFor pkgs).overrideAttrs {
            cargoBuildFlags = [
              "--bin=udplb"
              "--example=datagram"
            ];
            doCheck = false;
            doInstallCheck = false;
            installPhase = ''
              cd target/${pkgs.stdenv.hostPlatform.rust.cargoShortTarget}/release
              install -D -t $out udplb
              install -D -t $out/examples examples/datagram
            '';
          };
          demo = pkgs.writeShellApplication {
            name = "udplb-demo";
            # all that it runs: it hides /run, where NixOS keeps the rest
            runtimeInputs = [
              pkgs.coreutils
              pkgs.diffutils
              pkgs.gnused
              pkgs.iproute2
              pkgs.util-linux
            ];
            text = ''
              [ "$(id -u)" = 0 ] || exec sudo "$0"
              exec ${./tests/demo} ${build}
            '';
          };
        in
        {
          demo = {
            type = "app";
            meta.description = "shows packets being relayed, in a lab that is gone afterwards";
            program = lib.getExe demo;
          };
        }
      );

      checks = forAllSystems (
        pkgs:
        {
          # with its unit tests
          package = udplbFor pkgs;

          module = pkgs.runCommand "udplb-module-cases" {
            nativeBuildInputs = [
              pkgs.deadnix
              pkgs.mypy
              pkgs.nix
              pkgs.nixfmt
              pkgs.python3
              pkgs.python3Packages.pyflakes
              pkgs.systemd
            ];
            NIXPKGS_LIB = nixpkgs;
          } "HOME=$TMPDIR python3 ${self}/tests/nix/run.py --udplb ${lib.getExe (udplbFor pkgs)} | tee $out";

          format =
            pkgs.runCommand "udplb-format"
              {
                nativeBuildInputs = [
                  pkgs.cargo
                  pkgs.rustfmt
                ];
              }
              ''
                cd ${self}
                cargo fmt --check
                touch $out
              '';
        }
        // lib.mapAttrs' (name: lib.nameValuePair "vm-${name}") (udplbFor pkgs).tests
      );
    };
}
