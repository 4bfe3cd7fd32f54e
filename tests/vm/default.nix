# The scenarios: name -> NixOS test. Each NAME.nix has its script in NAME.py.
lib:
let
  scripts = lib.filter (lib.hasSuffix ".py") (lib.attrNames (builtins.readDir ./.));
  names = map (lib.removeSuffix ".py") (lib.remove "udp.py" scripts);
in
lib.genAttrs names (name: ./. + "/${name}.nix")
