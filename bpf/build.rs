//! Compiles bpf/udplb.bpf.c and generates its skeleton.

use std::path::PathBuf;
use std::{env, fs};

use libbpf_cargo::SkeletonBuilder;
use sha2::{Digest, Sha256};

const SOURCE: &str = "bpf/udplb.bpf.c";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let object = out.join("udplb.bpf.o");
    // Debian keeps asm/types.h where only the native target looks
    let multiarch = format!(
        "-I/usr/include/{}-linux-gnu",
        env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the target")
    );
    let arguments = ["-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", &multiarch];
    SkeletonBuilder::new()
        .source(SOURCE)
        .obj(&object)
        .clang_args(arguments)
        .build_and_generate(out.join("udplb.skel.rs"))
        .unwrap_or_else(|error| panic!("{SOURCE} does not build: {error:#}"));
    let bytes = fs::read(&object).expect("the object was just built");
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    println!("cargo::rustc-env=UDPLB_OBJECT_SHA256={digest}");
    println!("cargo::rerun-if-changed=bpf");
}
