//! Compiles floors.bpf.c as bpf/build.rs compiles the product, and generates its skeleton.

use std::env;
use std::path::PathBuf;

use libbpf_cargo::SkeletonBuilder;

const SOURCE: &str = "floors.bpf.c";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // Debian has asm/types.h in a directory that clang searches for the native target only; BPF
    // can use the same file
    let host = env::var("HOST").expect("cargo sets the host");
    let multiarch =
        format!("-I/usr/include/{}-linux-gnu", host.split('-').next().unwrap_or_default());
    SkeletonBuilder::new()
        .source(SOURCE)
        .obj(out.join("floors.bpf.o"))
        .clang_args(["-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", &multiarch])
        .build_and_generate(out.join("floors.skel.rs"))
        .unwrap_or_else(|error| panic!("{SOURCE} does not build: {error:#}"));
    println!("cargo::rerun-if-changed={SOURCE}");
}
