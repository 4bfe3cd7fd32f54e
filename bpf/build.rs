//! Compiles bpf/udplb.bpf.c to the full and the small object, and generates their skeleton.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use libbpf_cargo::SkeletonBuilder;
use sha2::{Digest, Sha256};

const SOURCE: &str = "bpf/udplb.bpf.c";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let [object, small] = ["udplb.bpf.o", "small.bpf.o"].map(|name| out.join(name));
    let skeleton = out.join("udplb.skel.rs");
    // Debian has asm/types.h in a directory that clang searches for the native target only; BPF
    // can use the same file
    let host = env::var("HOST").expect("cargo sets the host");
    let multiarch =
        format!("-I/usr/include/{}-linux-gnu", host.split('-').next().unwrap_or_default());
    let arguments = ["-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", &multiarch];
    SkeletonBuilder::new()
        .source(SOURCE)
        .obj(&object)
        .clang_args(arguments)
        .build_and_generate(&skeleton)
        .unwrap_or_else(|error| panic!("{SOURCE} does not build: {error:#}"));
    SkeletonBuilder::new()
        .source(SOURCE)
        .obj(&small)
        .clang_args(arguments.into_iter().chain(["-DSMALL_OBJECT"]))
        .build()
        .unwrap_or_else(|error| panic!("{SOURCE} does not build without extras: {error:#}"));
    add_choice(&skeleton);
    let digest = [&object, &small].into_iter().fold(Sha256::new(), |digest, object| {
        digest.chain_update(fs::read(object).expect("the object was just built"))
    });
    let digest: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("cargo::rustc-env=UDPLB_OBJECT_SHA256={digest}");
    println!("cargo::rustc-env=UDPLB_COMMIT={}", commit());
    println!("cargo::rerun-if-changed=bpf");
}

/// Lets the skeleton open another object than the one that it was generated from. libbpf-cargo has no option
/// for this, and two skeletons would have two sets of types.
fn add_choice(skeleton: &Path) {
    const CHANGES: [(&str, &str); 4] = [
        ("pub obj_builder: ", "pub object: Option<&'static [u8]>,\n        pub obj_builder: "),
        ("build_skel_config()?", "build_skel_config(self.object.unwrap_or(&DATA))?"),
        ("fn build_skel_config(\n", "fn build_skel_config(object: &'static [u8],\n"),
        ("ObjectSkeletonConfigBuilder::new(&DATA)", "ObjectSkeletonConfigBuilder::new(object)"),
    ];
    let text = fs::read_to_string(skeleton).expect("the skeleton was just generated");
    let text = CHANGES.iter().fold(text, |text, (before, after)| {
        assert_eq!(text.matches(before).count(), 1, "{before:?} in the skeleton of libbpf-cargo");
        text.replace(before, after)
    });
    fs::write(skeleton, text).expect("the skeleton is written again");
}

/// Returns the commit: from UDPLB_COMMIT (set by package builds), the crate's file, or git. A debug
/// build does not ask git, because it would be rebuilt after each commit.
fn commit() -> String {
    const UNKNOWN: &str = "unknown";
    println!("cargo::rerun-if-env-changed=UDPLB_COMMIT");
    if let Ok(commit) = env::var("UDPLB_COMMIT") {
        return commit;
    }
    // written by `cargo package`
    if let Ok(info) = fs::read_to_string(".cargo_vcs_info.json") {
        let commit = info.split("\"sha1\": \"").nth(1).and_then(|rest| rest.split('"').next());
        return commit.unwrap_or(UNKNOWN).into();
    }
    if env::var("PROFILE").is_ok_and(|profile| profile == "debug") {
        return format!("{UNKNOWN} (debug build)");
    }
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"]);
    if let Some(log) = log.filter(|log| fs::exists(log).unwrap_or(false)) {
        println!("cargo::rerun-if-changed={log}");
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .unwrap_or_else(|| UNKNOWN.into())
}

/// Returns the output of a git command; `None` if it fails or is empty.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_string();
    (output.status.success() && !text.is_empty()).then_some(text)
}
