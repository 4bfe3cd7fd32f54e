#!/usr/bin/env python3
"""Checks flake, module, package and VM tests with the lib/ folder of nixpkgs alone.

Without lib/ or without Nix the evaluation is skipped, loudly; the fixtures that it makes
say of which sources they are. Linters that are not installed are skipped each. The last line counts.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import package

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FIXTURES = ROOT / "tests/vm/fixtures"
DRIVER = ROOT / "tests/vm/driver"
WORDS = HERE / "words.json"
EXPOSURE = 2.5
STALE = "stale: tests/nix/run.py --write-fixtures writes it anew"

count = {"passed": 0, "failed": 0, "skipped": 0}


def report(what: str, wrong: str = "") -> None:
    count["failed" if wrong else "passed"] += 1
    print(f"FAIL  {what}: {wrong}" if wrong else f"ok    {what}", flush=True)


def skip(what: str, why: str) -> None:
    count["skipped"] += 1
    print(f"SKIP  {what}: {why}", flush=True)


def run(*command: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def lint(what: str, program: str, *args: str | Path, **kwargs: Any) -> None:
    if not shutil.which(program):
        skip(what, f"no {program}")
        return
    result = run(program, *args, **kwargs)
    report(what, (result.stdout + result.stderr) if result.returncode else "")


class Nix:
    """Evaluates one attribute of eval.nix at a time."""

    def __init__(self, program: str, lib: Path):
        self.program, self.lib = program, lib

    def instantiate(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        # No store is needed, and none may exist.
        env = {**os.environ, "NIX_REMOTE": "dummy://"}
        return run(self.program, "--eval", "--strict", "--json", *args, env=env)

    def is_old(self) -> bool:
        return self.instantiate("-E", "builtins ? readFileType").stdout.strip() == "false"

    def get(self, attribute: str) -> tuple[Any, str]:
        result = self.instantiate(HERE / "eval.nix", "--arg", "libPath", self.lib, "-A", attribute)
        error = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)
        return (None if result.returncode else json.loads(result.stdout)), error


def check_expectation(expect: dict[str, Any], got: dict[str, Any]) -> str:
    if got["failed"]:
        return f"assertions failed: {got['failed']}"
    if "units" in expect and sorted(got["units"]) != expect["units"]:
        return f"units: {sorted(got['units'])}"
    if "etc" in expect and sorted(got["etc"]) != expect["etc"]:
        return f"etc: {sorted(got['etc'])}"
    if "file" in expect:
        file = json.loads(got["etc"]["udplb.yaml"]["text"])
        if file != expect["file"]:
            return f"udplb.yaml: {file}"
    for interface, ports in expect.get("open", {}).items():
        if got["firewall"]["open"].get(interface) != ports:
            return f"firewall: {got['firewall']['open']}"
    for kind in ("kernelModules", "kernelConfig"):
        if kind in expect and got[kind] != expect[kind]:
            return f"{kind}: {got[kind]}"
    for unit, pattern in expect.get("says", {}).items():
        if not re.search(pattern, got["units"][unit]):
            return f"{unit} does not say {pattern}: {got['units'][unit]}"
    for unit, pattern in expect.get("silent", {}).items():
        if match := re.search(pattern, got["units"][unit]):
            return f"{unit} says {match[0]}"
    return ""


def check_units(name: str, units: dict[str, str]) -> None:
    """Checks the unit files as systemd itself reads them."""
    if not units:
        return
    if not shutil.which("systemd-analyze"):
        skip(f"{name}: units", "no systemd-analyze")
        return
    with tempfile.TemporaryDirectory() as folder:
        for unit, text in units.items():
            # The package is not built here: an existing program replaces it.
            Path(folder, unit).write_text(re.sub(r"\"?/stub/[^ \"]*/bin/[^ \"]+\"?", "/bin/true", text))
        files = [str(Path(folder, unit)) for unit in units]
        said = run("systemd-analyze", "verify", "--man=no", *files).stderr
        ours = [line for line in said.splitlines() if any(unit in line for unit in units)]
        report(f"{name}: systemd-analyze verify", "\n".join(ours))
        for file in files:
            if not file.endswith(".service"):
                continue
            said = run("systemd-analyze", "security", "--offline=true", "--no-pager", file).stdout
            level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
            wrong = "" if level and float(level[1]) <= EXPOSURE else said
            report(f"{name}: {Path(file).name}: exposure {level[1] if level else '?'}", wrong)


def check_built(name: str, etc: dict[str, Any], udplb: str, expect: str) -> None:
    """Runs the check of the configuration file that the build of the system runs."""
    for file, entry in etc.items():
        if not entry["check"] or entry["text"] is None:
            continue
        if not udplb:
            skip(f"{name}: check of {file}", "no --udplb")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, file)
            source.write_text(entry["text"])
            env = {
                "source": str(source),
                "out": str(Path(folder, "out")),
                "PATH": f"{Path(udplb).resolve().parent}:{os.environ['PATH']}",
            }
            result = run("bash", "-euc", entry["check"], env=env)
            if expect:
                said = result.returncode == 65 and re.search(expect, result.stderr)
                report(f"{name}: refused by udplb check", "" if said else f"{result.returncode}: {result.stderr}")
            else:
                report(f"{name}: udplb check", result.stderr if result.returncode else "")


def check_cases(nix: Nix, udplb: str) -> None:
    expected, error = nix.get("expect")
    if expected is None:
        report("cases", error)
        return
    for name, expect in sorted(expected.items()):
        got, error = nix.get(f"case.{name}")
        if "error" in expect:
            flat = " ".join(error.split())
            if got is not None:
                report(name, "evaluates")
            else:
                report(name, "" if re.search(expect["error"], flat) else f"another error: {flat}")
        elif got is None:
            report(name, error)
        elif "failed" in expect:
            found = any(re.search(expect["failed"], message) for message in got["failed"])
            report(name, "" if found else f"assertions that failed: {got['failed']}")
        elif "check" in expect:
            check_built(name, got["etc"], udplb, expect["check"])
        else:
            report(name, check_expectation(expect, got))
            check_units(name, got["units"])
            if name == "units-with-file":
                check_contrib("the module", {unit: text.splitlines() for unit, text in got["units"].items()})
            check_built(name, got["etc"], udplb, "")


def words(schema: Any) -> set[str]:
    """Returns all property names and enum values of a JSON schema."""
    found: set[str] = set()
    if isinstance(schema, dict):
        found |= {name for name, value in schema.get("properties", {}).items() if value}
        found |= {value for value in schema.get("enum", []) if isinstance(value, str)}
        for value in schema.values():
            found |= words(value)
    elif isinstance(schema, list):
        for value in schema:
            found |= words(value)
    return found


def check_words(udplb: str) -> None:
    """Checks that the module has the words of the built program, and no others."""
    if not udplb:
        skip("the module has the program's words", "no --udplb")
        return
    theirs = words(json.loads(run(udplb, "schema").stdout)) - {"version"}
    wrong = theirs.symmetric_difference(json.loads(WORDS.read_text()))
    report("the module has the program's words", f"{sorted(wrong)}: nixos/module.nix and {WORDS}" if wrong else "")


def check_options(nix: Nix) -> None:
    """Checks that every option has a description and an example."""
    options, error = nix.get("options")
    if options is None:
        report("options", error)
        return
    for what in ("description", "example"):
        without = [option["name"] for option in options if not option[what]]
        report(f"all {len(options)} options have a{'n' * (what == 'example')} {what}", ", ".join(without))


def check_package(nix: Nix, write: bool) -> None:
    package, error = nix.get("package")
    report("package" if package is None else f"package {package['pname']} {package['version']}", "" if package else error)
    escaped, error = nix.get("escaped")
    report("device names escape as systemd-escape does", error if escaped is None else wrong_escapes(escaped))
    known, error = nix.get("words")
    if write and known:
        WORDS.write_text(json.dumps(sorted(set(known)), indent=1) + "\n")
    fresh = known and sorted(set(known)) == json.loads(WORDS.read_text())
    report("the module's words are those of words.json", "" if fresh else error or STALE)


def build_package() -> None:
    """Checks the steps in order; each needs the one before."""
    if not shutil.which("cargo"):
        skip("the package's build", "no cargo")
        return
    for what, step in package.STEPS.items():
        try:
            step()
        except package.Wrong as error:
            report(f"the package {what}", str(error))
            return
        report(f"the package {what}")


def check_demo(udplb: str) -> None:
    """Runs the flake's demo with only its runtimeInputs on the PATH, taken from Debian here."""
    inputs = re.search(r"runtimeInputs = \[(.*?)\]", (ROOT / "flake.nix").read_text(), re.DOTALL)
    debian = {"gnused": "sed", "util-linux": "util-linux mount"}
    packages = " ".join(debian.get(name, name) for name in re.findall(r"pkgs\.(\S+)", inputs[1] if inputs else ""))
    listed = run("dpkg", "-L", *packages.split()) if shutil.which("dpkg") else None
    become_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    built = Path(udplb).resolve().parent
    if not udplb or not (built / "examples/datagram").exists() or not listed or listed.returncode:
        skip("the demo with its own programs alone", "needs --udplb beside examples/datagram, and Debian")
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {Path(file).name: file for file in listed.stdout.split() if re.fullmatch(r"(/usr)?/s?bin/[^/]+", file)}
        for name, file in files.items():
            Path(folder, name).symlink_to(file)
        result = run(*become_root, "env", "-i", f"PATH={folder}", "/bin/sh", ROOT / "tests/demo", built)
        report("the demo with its own programs alone", (result.stdout + result.stderr) if result.returncode else "")


def wrong_escapes(escaped: dict[str, str]) -> str:
    if not shutil.which("systemd-escape"):
        return ""
    return "".join(
        f"{name}: {ours}\n"
        for name, ours in escaped.items()
        if run("systemd-escape", "-p", f"/sys/subsystem/net/devices/{name}").stdout.strip() != ours
    )


@functools.cache
def sources() -> str:
    """Returns the digest of the .nix files that fixtures are made of."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in ("nixos", "tests/nix", "tests/vm") for file in (ROOT / folder).glob("*.nix")):
        digest.update(f"{file.relative_to(ROOT)}\0{file.read_text()}\0".encode())
    return digest.hexdigest()


def fixture(test: dict[str, Any]) -> str:
    """Returns the data that the driver needs of a test, without the script: the driver reads the .py itself."""

    def files(summary: dict[str, Any]) -> dict[str, Any]:
        return {
            "etc": {name: {key: e[key] for key in ("target", "text", "path")} for name, e in summary["etc"].items()},
            "units": {name: text.splitlines() for name, text in summary["units"].items()},
            "firewall": summary["firewall"],
            "networkd": summary["networkd"],
            "packages": summary["packages"],
        }

    nodes = {
        name: files(node)
        | {"links": node["links"], "sysctl": node["sysctl"]}
        | {"specialisations": {n: files(s) for n, s in node["specialisations"].items()}}
        for name, node in test["nodes"].items()
    }
    test = {"name": test["name"], "globalTimeout": test["globalTimeout"], "nodes": nodes, "sources": sources()}
    return json.dumps(test, indent=1, sort_keys=True) + "\n"


def check_scenarios(nix: Nix, udplb: str, write: bool) -> None:
    tests, error = nix.get("test")
    if tests is None:
        report("scenarios", error)
        return
    stored = {file.stem for file in FIXTURES.glob("*.json")}
    if not write and stored - tests.keys():
        report("fixtures", f"without a scenario: {stored - tests.keys()}")
    for name, test in sorted(tests.items()):
        script = (ROOT / f"tests/vm/{name}.py").read_text()
        report(f"{name}: runs {name}.py", "" if test["testScript"] == script else "another script")
        file = FIXTURES / f"{name}.json"
        if write:
            file.write_text(fixture(test))
        fresh = file.exists() and file.read_text() == fixture(test)
        report(f"{name}: fixture", "" if fresh else STALE)
        for machine, node in test["nodes"].items():
            for place, summary in [(machine, node)] + [
                (f"{machine}/{n}", s) for n, s in node["specialisations"].items()
            ]:
                if summary["failed"]:
                    report(f"{name}: {place}", str(summary["failed"]))
                check_built(f"{name}: {place}", summary["etc"], udplb, "")


def check_flake(nix: Nix) -> None:
    """Evaluates every output of the flake against a nixpkgs of stand-ins."""
    program = Path(shutil.which(nix.program) or nix.program).with_name("nix")
    if not program.exists() or not shutil.which("git"):
        skip("flake", f"needs {program} and git")
        return
    with tempfile.TemporaryDirectory() as folder:
        nixpkgs = Path(folder, "nixpkgs")
        nixpkgs.mkdir()
        shutil.copytree(nix.lib / "lib", nixpkgs / "lib")
        shutil.copy(HERE / "stubs.nix", nixpkgs)
        shutil.copy(HERE / "stub-flake.nix", nixpkgs / "flake.nix")
        env = {**os.environ, "HOME": folder, "NIX_REMOTE": f"local?root={folder}/root"}
        source = Path(folder, "source")
        tracked = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").stdout.split()
        if not tracked:
            skip("flake", "no git checkout")
            return
        for file in tracked:
            if (ROOT / file).is_file():
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, source / file)
        options = ["--extra-experimental-features", "nix-command flakes", "--offline", "--no-write-lock-file"]
        options += ["--override-input", "nixpkgs", f"path:{nixpkgs}"]
        for command in (["show", "--all-systems"], ["check", "--no-build", "--all-systems"]):
            result = run(program, "flake", *command, *options, f"path:{source}", env=env)
            report(f"nix flake {' '.join(command)}", result.stderr if result.returncode else "")
        for output, function in (
            ("overlays.default", "o: (o { callPackage = file: _: import file; } { }) ? udplb"),
            ("nixosModules", "m: m.default.key == m.udplb.key"),
        ):
            result = run(program, "eval", *options, f"path:{source}#{output}", "--apply", function, env=env)
            report(f"{output} of the flake", "" if result.stdout.strip() == "true" else result.stdout + result.stderr)
        run("chmod", "-R", "u+w", folder)


def lint_nix() -> None:
    files = [file for file in ROOT.rglob("*.nix") if not file.is_relative_to(ROOT / "target")]
    lint("nixfmt", "nixfmt", "--check", *files)
    lint("deadnix", "deadnix", "--fail", *files)


def lint_scripts() -> None:
    """Lints the scripts as the NixOS test driver does, and our own Python."""
    pyflakes = shutil.which("pyflakes") or shutil.which("pyflakes3") or "pyflakes"
    env = {**os.environ, "MYPYPATH": f"{DRIVER}:{ROOT / 'tests/deb'}:{ROOT / 'tests/docs'}"}
    own = ["nix/package.py", "nix/run.py", "vm/driver/nsdriver.py", "vm/driver/switch-to-configuration", "vm/udp.py"]
    own += ["docs/run", "docs/blocks.py", "lint/language.py", "lint/layers.py"]
    own += [f"deb/{name}" for name in ("lab.py", "run", "tarball")]
    own += [f"pictures/{name}.py" for name in ("dashboard", "terminal", "traffic")]
    # the types of libraries depend on their version, and on whether they are installed
    alone = ["--follow-imports=skip", "--ignore-missing-imports"]
    for name in own:
        lint(f"pyflakes: {name}", pyflakes, ROOT / "tests" / name)
        libraries = alone if name.startswith("pictures/") else []
        lint(f"mypy: {name}", "mypy", "--strict", *libraries, ROOT / "tests" / name, env=env)
    for file in sorted(FIXTURES.glob("*.json")):
        name = file.stem
        machines = sorted(json.loads(file.read_text())["nodes"])
        script = (ROOT / f"tests/vm/{name}.py").read_text()
        symbols = ["driver", "join_all", "log", "machines", "polling_condition", "retry", "start_all", "subtest", "t"]
        known = {**os.environ, "PYFLAKES_BUILTINS": ",".join(machines + symbols)}
        lint(f"pyflakes: {name}", pyflakes, input=script, env=known)
        hints = (DRIVER / "script-types.pyi").read_text() + "".join(f"{m}: Machine\n" for m in machines)
        with tempfile.TemporaryDirectory() as folder:
            typed = Path(folder, f"{name}.py")
            typed.write_text(hints + script)
            lint(f"mypy: {name}", "mypy", "--no-implicit-optional", "--pretty", "--no-color-output", typed, env=env)


def directives(unit: list[str]) -> set[str]:
    """Returns a word for each value, without those that must differ: programs, devices, NixOS' own marks."""
    found = set()
    section = ""
    for line in unit:
        if line.startswith("["):
            section = line
        elif "=" in line and not line.startswith("#"):
            key, values = line.split("=", 1)
            if not key.startswith(("Exec", "X-")):
                words = [values] if key == "Description" else values.split()
                found |= {f"{section} {key}={value}" for value in words if not value.endswith(".device")}
    return found


def check_contrib(name: str, units: dict[str, list[str]]) -> None:
    """Checks that Debian's units equal the module's."""
    for file in sorted((ROOT / "contrib/systemd").iterdir()):
        ours, theirs = directives(file.read_text().splitlines()), directives(units[file.name])
        report(f"contrib: {file.name} and {name} agree", "\n".join(sorted(ours ^ theirs)))


def check_fixtures() -> None:
    """Checks without Nix that the fixtures were made of these sources, and that Debian's units are like theirs."""
    for file in sorted(FIXTURES.glob("*.json")):
        stored = json.loads(file.read_text())
        report(f"{file.stem}: fixture is of these .nix files", "" if stored.get("sources") == sources() else STALE)
    relay = json.loads((FIXTURES / "reload.json").read_text())["nodes"]["relay"]
    check_contrib("the fixture", relay["specialisations"]["file"]["units"])


@functools.cache
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lib", default=os.environ.get("NIXPKGS_LIB", ""), help="the folder that holds nixpkgs' lib/ (NIXPKGS_LIB)"
    )
    parser.add_argument("--nix", default="nix-instantiate", help="Nix 2.14 or newer")
    parser.add_argument("--udplb", default="", help="the program: checks the generated files with it")
    parser.add_argument("--write-fixtures", action="store_true", help="write words.json and tests/vm/fixtures anew")
    return parser.parse_args()


def find_lib(args: argparse.Namespace) -> Path | None:
    """Returns the folder of nixpkgs' lib/: the given one, or that of Nix' own search path."""
    if args.lib or not shutil.which(args.nix):
        return Path(args.lib).resolve() if args.lib else None
    found = run(args.nix, "--eval", "--json", "-E", "toString <nixpkgs>", env={**os.environ, "NIX_REMOTE": "dummy://"})
    return Path(json.loads(found.stdout)) if found.returncode == 0 else None


def main() -> int:
    args = arguments()
    lib = find_lib(args)
    lint_nix()
    lint_scripts()
    check_words(args.udplb)
    check_demo(args.udplb)
    build_package()
    if not shutil.which(args.nix):
        skip("EVERYTHING THAT EVALUATES", f"no {args.nix}")
    elif not lib or not (lib / "lib/default.nix").is_file():
        skip("EVERYTHING THAT EVALUATES", "no nixpkgs lib: give --lib or NIXPKGS_LIB")
    elif (nix := Nix(args.nix, lib)).is_old():
        skip("EVERYTHING THAT EVALUATES", f"{args.nix} is older than 2.18")
    else:
        check_package(nix, args.write_fixtures)
        check_options(nix)
        check_cases(nix, args.udplb)
        check_scenarios(nix, args.udplb, args.write_fixtures)
        check_flake(nix)
    check_fixtures()
    print(", ".join(f"{number} {what}" for what, number in count.items()))
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
