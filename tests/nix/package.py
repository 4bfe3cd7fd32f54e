"""Builds the package of nixos/package.nix without Nix: its fileset alone, in an empty folder, offline.

Paths, flags and phases are read from the .nix file. Only the profile differs: debug, for which the
dependencies have been built already.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = ROOT / "nixos/package.nix"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").absolute()
FOLDER = TARGET / "nix"
SOURCE, BUILT, OUT = FOLDER / "source", FOLDER / "built", FOLDER / "out"

# nixpkgs' installShellFiles and versionCheckHook, as far as the package uses them
HOOKS = r"""
installManPage() {
	for page; do
		[[ $page == *.[1-9] ]] || { echo "installManPage: $page has no section"; exit 1; }
		install -D -m 644 -t "$out/share/man/man${page##*.}" "$page"
	done
}
installShellCompletion() {
	local name= shell= folder=
	while [ $# != 0 ]; do
		case $1 in
		--cmd) name=$2 ;;
		--bash) folder=bash-completion/completions shell=$name.bash ;;
		--fish) folder=fish/vendor_completions.d shell=$name.fish ;;
		--zsh) folder=zsh/site-functions shell=_$name ;;
		*) echo "installShellCompletion: $1"; exit 1 ;;
		esac
		[ "$1" = --cmd ] || install -D -m 644 "$2" "$out/share/$folder/$shell"
		shift 2
	done
}
"""

# paths relative to $out; none may be empty
INSTALLED = [
    "bin/udplb",
    "share/bash-completion/completions/udplb.bash",
    "share/doc/udplb/LICENSE",
    "share/doc/udplb/examples/udplb.yaml",
    "share/fish/vendor_completions.d/udplb.fish",
    "share/man/man1/udplb.1",
    "share/man/man1/udplb-apply.1",
    "share/man/man5/udplb.yaml.5",
    "share/udplb/alerts.yaml",
    "share/udplb/grafana.json",
    "share/zsh/site-functions/_udplb",
]


# the objects for the kernel that the program contains
PRODUCT = {"udplb.bpf.o", "small.bpf.o"}


class Wrong(Exception):
    pass


def read(pattern: str) -> str:
    found = re.search(pattern, PACKAGE.read_text(), re.DOTALL)
    if not found:
        raise Wrong(f"{PACKAGE}: no match for {pattern}")
    return found[1]


def fileset() -> list[str]:
    """Returns the paths in the fileset, relative to the repository."""
    words = read(r"fileset\.unions \[(.*?)\]").split()
    if wrong := [word for word in words if not word.startswith("../")]:
        raise Wrong(f"only plain paths can be read from the fileset: {wrong}")
    return [word.removeprefix("../") for word in words]


def phase(name: str) -> str:
    """Returns the shell text of a phase, with Nix' interpolations replaced by the folders used here."""
    text = "".join(re.findall(r"''(.*?)''", read(rf"\n  {name} =(.*?);\n"), re.DOTALL))
    text = text.replace("target/${stdenv.hostPlatform.rust.cargoShortTarget}/release", f"{BUILT}/debug")
    if found := re.search(r"\$\{.*?\}", text):
        raise Wrong(f"{name}: {found[0]} means nothing here")
    return text


def copy(paths: list[str]) -> None:
    """Copies the files that git knows below the paths into an empty folder. Times are kept, for cargo."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for path in paths:
        listed = run(ROOT, "git", "ls-files", "-co", "--exclude-standard", "--", path).split("\n")
        files = [file for file in listed if file and (ROOT / file).is_file()]
        if not files:
            raise Wrong(f"the fileset names {path}, where nothing is")
        for file in files:
            (SOURCE / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, SOURCE / file)
    for folder, _, _ in os.walk(SOURCE, topdown=False):
        shutil.copystat(ROOT / Path(folder).relative_to(SOURCE), folder)


def run(folder: Path, *command: str, **env: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise Wrong(f"{' '.join(command)}: {done.stderr[-4000:]}{done.stdout[-4000:]}")
    return done.stdout


def cargo(*arguments: str) -> str:
    """Shares the dependencies of other builds. Without debug information udplb itself is another unit than theirs."""
    command = ["cargo", *arguments, "--locked", "--offline", "--config", "profile.dev.package.udplb.debug=0"]
    return run(SOURCE, *command, CARGO_TARGET_DIR=str(BUILT), CARGO_BUILD_BUILD_DIR=str(TARGET))


def foreign_objects(messages: str) -> list[str]:
    """Returns the objects for the kernel that the product lacks."""
    lines = (json.loads(line) for line in messages.splitlines() if line.startswith("{"))
    folders = [Path(line["out_dir"]) for line in lines if line["reason"] == "build-script-executed"]
    objects = [file.name for folder in folders for file in folder.glob("*.bpf.o")]
    if missing := PRODUCT.difference(objects):
        raise Wrong(f"the build has no {', '.join(sorted(missing))}")
    return [name for name in objects if name not in PRODUCT]


def build() -> None:
    copy(fileset())
    if foreign := foreign_objects(cargo("build", "--message-format=json")):
        raise Wrong(f"the product does not need {foreign}, and compiles it")


def test() -> None:
    cargo("test", *re.findall(r'"(.*?)"', read(r"cargoTestFlags = \[(.*?)\]")))
    run(SOURCE, "bash", "-euc", phase("postCheck"))


def install() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "bin").mkdir(parents=True)
    shutil.copy(BUILT / "debug/udplb", OUT / "bin")
    run(SOURCE, "bash", "-euc", HOOKS + phase("postInstall"), out=str(OUT))
    if missing := [file for file in INSTALLED if not (OUT / file).is_file() or not (OUT / file).stat().st_size]:
        raise Wrong(f"postInstall does not make {missing}")
    version = re.search(r'^version = "(.*?)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    program = str(OUT / "bin/udplb")
    said = run(Path("/"), "env", "--ignore-environment", program, read(r'versionCheckProgramArg = "(.*?)"'))
    if not version or version[1] not in said:
        raise Wrong(f"the program says it is {said}")


STEPS = {"builds from its fileset": build, "passes its tests": test, "installs": install}
