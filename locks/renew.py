"""Renew the lock (`make upgrade`), or print what is installed in other versions than the lock names (`--compare`).

constraints.txt    every package with version and marker, torch and the CUDA packages of its Linux build too
requirements.txt   the same without torch and CUDA, with the hash of every file: pip takes nothing else

There are two files because PyTorch offers several builds of one version (CPU, CUDA) whose hashes differ:
torch is pinned but not hashed, so that a CPU build which is already in the environment is kept.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

UV = "uv==0.13.9"  # resolves once for every Python and system; lives in a throw-away environment
ROOT = Path(__file__).parent.parent
CONSTRAINTS, REQUIREMENTS = ROOT / "locks" / "constraints.txt", ROOT / "locks" / "requirements.txt"
NOT_LOCKED = {"sweep"}  # extras that `make` does not install
TORCH = re.compile(r"torch|triton|(nvidia|cuda)-.*")  # pinned, not hashed
HEAD = "# {}. Written by `make upgrade` from pyproject.toml; not for editing.\n"


def locked():
    """Every package of the lock with its versions: mostly one, more where the newest needs a newer Python."""
    found = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", CONSTRAINTS.read_text(), re.M):
        found.setdefault(name, []).append(version)
    return found


def renew():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = re.search(r">=([\d.]+)", project["project"]["requires-python"])[1]
    extras = [f"--extra={e}" for e in project["project"]["optional-dependencies"] if e not in NOT_LOCKED]
    before = locked() if CONSTRAINTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin = Path(folder) / "bin"
        subprocess.run([bin / "python", "-m", "pip", "install", "--quiet", UV], check=True)
        command = [bin / "uv", "pip", "compile", "--quiet", "--universal", "--python-version", oldest, "--no-header"]
        command += ["--python", sys.executable, "--generate-hashes", *extras, "pyproject.toml", "-"]
        build = "\n".join(project["build-system"]["requires"])
        done = subprocess.run(command, cwd=ROOT, input=build, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit("lddyn: uv found no resolution (above); the lock is as it was")
    # A package is its line (`name==version ; marker \\`) and the indented ones after it: hashes, what needs it.
    packages = re.findall(r"^[\w.-]+==.*\n(?: .*\n)*", done.stdout, re.M)
    hashed = [p for p in packages if not TORCH.fullmatch(p.split("==")[0])]
    pins = [p.splitlines()[0].removesuffix("\\").rstrip() + "\n" for p in packages]
    CONSTRAINTS.write_text(HEAD.format("Every package, for pip's --constraint") + "".join(pins))
    REQUIREMENTS.write_text(HEAD.format("All but torch and CUDA, for pip's --require-hashes") + "".join(hashed))
    after = locked()
    for name in sorted(before.keys() | after.keys()):
        old, new = (" and ".join(d.get(name, ["nothing"])) for d in (before, after))
        if old != new:
            print(f"{name}: {old} -> {new}")
    print(f"lddyn: {len(after)} packages are locked; run `make test` and `make book` before you commit locks/")


def compare():
    lock, same = locked(), True
    for d in sorted(importlib.metadata.distributions(), key=lambda d: d.name.lower()):
        name = re.sub(r"[-_.]+", "-", d.name).lower()
        if name not in {"lddyn", "pip"} and d.version.split("+")[0] not in lock.get(name, []):
            print(f"{name} {d.version}, in the lock {' and '.join(lock.get(name, ['nothing']))}")
            same = False
    if same:
        print("lddyn: every installed package has the version that the lock names")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="print what differs from the lock in this Python")
    compare() if parser.parse_args().compare else renew()
