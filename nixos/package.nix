{
  lib,
  stdenv,
  rustPlatform,
  installShellFiles,
  llvmPackages,
  pkg-config,
  elfutils,
  linuxHeaders,
  zlib,
}:
let
  cargo = (lib.importTOML ../Cargo.toml).package;
  runs = stdenv.buildPlatform.canExecute stdenv.hostPlatform;
in
rustPlatform.buildRustPackage {
  pname = cargo.name;
  inherit (cargo) version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../bpf
      ../examples
      ../src
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

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
  # Without its wrapper clang knows no include directory.
  env.C_INCLUDE_PATH = "${linuxHeaders}/include";

  # The tests in tests/ want root and network namespaces: the flake's VM checks stand for them.
  cargoTestFlags = [
    "--lib"
    "--bins"
  ];
  postCheck = ''
    target/${stdenv.hostPlatform.rust.cargoShortTarget}/release/udplb check --no-resolve examples/seed.yaml
  '';

  postInstall = lib.optionalString runs ''
    mkdir man
    $out/bin/udplb man man
    installManPage man/*
    installShellCompletion --cmd udplb \
      --bash <($out/bin/udplb completions bash) \
      --fish <($out/bin/udplb completions fish) \
      --zsh <($out/bin/udplb completions zsh)
  '';

  meta = {
    inherit (cargo) description;
    license = [
      lib.licenses.asl20
      lib.licenses.mit
      # the program in the kernel
      lib.licenses.gpl2Only
      lib.licenses.bsd2
    ];
    platforms = lib.platforms.linux;
    mainProgram = "udplb";
  };
}
