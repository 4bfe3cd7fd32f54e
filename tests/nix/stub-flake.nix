# Takes the place of nixpkgs when run.py looks at our flake. lib/ lies beside it.
{
  outputs =
    _:
    let
      lib = import ./lib;
      isInput = _: v: !builtins.isFunction v && (builtins.isAttrs v -> v ? outPath);
      # Real derivations, so that everything that a build would be given is evaluated.
      mkDrv =
        system: args:
        args
        // derivation (
          {
            inherit system;
            builder = "/bin/sh";
          }
          // lib.filterAttrs isInput (args // args.env or { })
        );
    in
    {
      inherit lib;
      legacyPackages = lib.genAttrs [ "aarch64-linux" "x86_64-linux" ] (
        system:
        (import ./stubs.nix {
          inherit lib system;
          mkDrv = mkDrv system;
        }).pkgs
      );
    };
}
