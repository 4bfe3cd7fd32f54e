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
      udplbFor = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system}.udplb;
      scenarios = import ./tests/vm lib;
    in
    {
      overlays.default = final: _prev: { udplb = final.callPackage ./nixos/package.nix { }; };

      packages = forAllSystems (pkgs: rec {
        udplb = pkgs.callPackage ./nixos/package.nix { };
        default = udplb;
      });

      nixosModules.default =
        { lib, pkgs, ... }:
        {
          imports = [ ./nixos/module.nix ];
          services.udplb.package = lib.mkDefault (udplbFor pkgs);
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
            installPhase = ''
              cd target/${pkgs.stdenv.hostPlatform.rust.cargoShortTarget}/release
              install -D -t $out udplb
              install -D -t $out/examples examples/datagram
            '';
          };
          demo = pkgs.writeShellApplication {
            name = "udplb-demo";
            runtimeInputs = [
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
        // lib.mapAttrs' (
          name: test:
          lib.nameValuePair "vm-${name}" (
            pkgs.testers.runNixOSTest {
              imports = [ test ];
              defaults.imports = [ self.nixosModules.default ];
            }
          )
        ) scenarios
      );
    };
}
