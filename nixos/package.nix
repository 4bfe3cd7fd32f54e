{
  lib,
  stdenv,
  buildPackages,
  rustPlatform,
  installShellFiles,
  versionCheckHook,
  llvmPackages,
  pkg-config,
  elfutils,
  linuxHeaders,
  testers,
  zlib,
  # for `udplb --version`; null: unknown
  commit ? null,
}:
let
  cargo = (lib.importTOML ../Cargo.toml).package;
  runs = stdenv.buildPlatform.canExecute stdenv.hostPlatform;
in
rustPlatform.buildRustPackage (finalAttrs: {
  pname = cargo.name;
  inherit (cargo) version;

  # tests/nix/package.py builds exactly this, without Nix.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../LICENSE
      ../LICENSES
      ../benches
      ../bpf
      ../contrib/alerts.yaml
      ../contrib/grafana.json
      ../README.md
      ../docs
      ../examples
      ../src
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # The build script links libbpf too, for the machine that builds.
  depsBuildBuild = [
    buildPackages.stdenv.cc
    elfutils
    zlib
  ];
  nativeBuildInputs = [
    installShellFiles
    # The wrapped clang adds flags that "-target bpf" refuses.
    llvmPackages.clang-unwrapped
    pkg-config
  ];
  buildInputs = [
    elfutils
    zlib
  ];
  env = {
    # Without its wrapper clang knows no include directory.
    C_INCLUDE_PATH = "${linuxHeaders}/include";
    UDPLB_COMMIT = if commit == null then "unknown" else commit;
  };

  # The tests in tests/ want root and network namespaces: the flake's VM checks stand for them.
  cargoTestFlags = [
    "--lib"
    "--bins"
  ];
  postCheck = ''
    target/${stdenv.hostPlatform.rust.cargoShortTarget}/release/udplb check --no-resolve examples/seed.yaml
  '';

  postInstall = ''
    install -D -m 644 -t $out/share/udplb contrib/alerts.yaml contrib/grafana.json
    install -D -m 644 -t $out/share/doc/udplb LICENSE LICENSES/* README.md
    install -D -m 644 -t $out/share/doc/udplb/docs docs/*.md
    install -D -m 644 -t $out/share/doc/udplb/examples examples/*.yaml examples/*.toml
  ''
  + lib.optionalString runs ''
    mkdir man
    $out/bin/udplb man man
    installManPage man/*
    installShellCompletion --cmd udplb \
      --bash <($out/bin/udplb completions bash) \
      --fish <($out/bin/udplb completions fish) \
      --zsh <($out/bin/udplb completions zsh)
  '';

  doInstallCheck = runs;
  nativeInstallCheckInputs = [ versionCheckHook ];
  versionCheckProgramArg = "--version";

  passthru.tests = lib.mapAttrs (
    _: test:
    testers.runNixOSTest {
      imports = [ test ];
      defaults = {
        imports = [ ./module.nix ];
        services.udplb.package = finalAttrs.finalPackage;
      };
    }
  ) (import ../tests/vm lib);

  meta = {
    inherit (cargo) description;
    license = [
      lib.licenses.asl20
      lib.licenses.mit
      # the program in the kernel
      lib.licenses.gpl2Only
      lib.licenses.bsd2
    ];
    maintainers = [ { name = cargo.metadata.deb.maintainer; } ];
    platforms = lib.platforms.linux;
    mainProgram = "udplb";
  }
  // lib.optionalAttrs (cargo ? repository) {
    homepage = cargo.repository;
    changelog = "${cargo.repository}/releases/tag/v${cargo.version}";
  };
})
