"""Kill `make book` at random moments and see that it ends with the records of an undisturbed build.

    python tests/kills.py [--kills 20] [--scale smoke] [--seed 0] [--longest 80]

Works in a copy of the working tree with its own runs. Builds once undisturbed; then builds again from nothing, killed
with all its processes after a random time, as often as asked; then lets that build end and compares the hash of every
record with the undisturbed one. Last, two builds at once. Prints one line for each step; the exit code is 1 when a
record differs or a build fails. Takes half an hour, so the test suite leaves it out.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def copy_of_the_tree(folder: Path) -> Path:
    """Tracked and new files, without what is ignored."""
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def start(tree: Path, runs: Path, scale: str) -> subprocess.Popen:
    environment = os.environ | {"LDDYN_RUNS": str(runs), "PYTHONPATH": str(tree)}
    log = (tree / "log.txt").open("a")
    words = [sys.executable, "-m", "lddyn", "book", "--scale", scale]
    return subprocess.Popen(words, cwd=tree, env=environment, stdout=log, stderr=log)


def kill(process: subprocess.Popen) -> None:
    """The process and everything that it started, with no chance to tidy up."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()


def tables(runs: Path) -> dict[str, str]:
    """Hash of every finished record."""
    found = {}
    for manifest in runs.glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        found[manifest.parent.name] = content.get("table_sha256", "unfinished")
    return found


def wipe(tree: Path, *more: Path) -> None:
    for folder in (tree / "book" / "notebooks", tree / "book" / "generated", tree / "book" / "_build", *more):
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=80.0, help="seconds until a kill at most")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(Path(folder) / "tree")
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        clock = time.time()
        if start(tree, whole, options.scale).wait():
            print((tree / "log.txt").read_text()[-2000:])
            return 1
        print(f"undisturbed: {len(tables(whole))} records in {time.time() - clock:.0f} s", flush=True)
        wipe(tree)
        differ = set()
        for number in range(1, options.kills + 1):
            process, moment = start(tree, broken, options.scale), moments.uniform(1, options.longest)
            try:
                process.wait(timeout=moment)
                state = f"ended by itself with code {process.returncode}"
            except subprocess.TimeoutExpired:
                kill(process)
                state = f"killed after {moment:.1f} s"
            done = {name: value for name, value in tables(broken).items() if value != "unfinished"}
            differ |= {name for name, value in done.items() if tables(whole).get(name) != value}
            print(f"{number:>3}: {state}, {len(done)} records finished, {len(differ)} differ", flush=True)
            if process.returncode == 0 and number < options.kills:
                wipe(tree, broken)
        code = start(tree, broken, options.scale).wait()
        differ |= {name for name, value in tables(whole).items() if tables(broken).get(name) != value}
        print(f"resumed: exit code {code}, {len(differ)} of {len(tables(whole))} records differ {sorted(differ)}")
        wipe(tree)
        codes = [process.wait() for process in [start(tree, broken, options.scale) for _ in range(2)]]
        print(f"two builds at once: exit codes {codes}")
        if code or any(codes):
            print((tree / "log.txt").read_text()[-2000:])
        return int(bool(code or any(codes) or differ))


if __name__ == "__main__":
    sys.exit(main())
