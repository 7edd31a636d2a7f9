"""Small tables that are kept beside the code, as JSON below `book/`: results of long runs, with their origin."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lddyn import unknown
from lddyn.engine.store import ROOT, Run, write_json

FOLDER = ROOT / "book"


def origin(runs: Sequence[Run]) -> dict[str, Any]:
    """Where numbers come from, out of the manifests of their runs: names, seeds, commit, versions, machine, times."""
    manifests = [r.manifest for r in runs]
    return {
        "runs": [r.folder.name for r in runs],
        "seeds": sorted({m["parameters"]["seed"] for m in manifests if "seed" in m["parameters"]}),
        "git": manifests[0]["git"],
        "versions": manifests[0]["versions"],
        "machine": manifests[0]["machine"],
        "finished": max(m["finished"] for m in manifests),
        "seconds": round(sum(m["seconds"] for m in manifests), 1),
    }


def in_words(made: Mapping[str, Any]) -> str:
    """An `origin` as one line."""
    words = [
        f"{len(made['seeds'])} seeds ({', '.join(map(str, made['seeds']))})",
        f"{len(made['runs'])} runs, {made['seconds']:.0f} CPU seconds on {made['machine']}",
        f"finished {made['finished'][:16].replace('T', ' ')} UTC",
        ", ".join(f"{k} {v}" for k, v in made["versions"].items()),
        f"commit {made['git']['commit'] or 'unknown'}{'+' if made['git']['dirty'] else ''}",
    ]
    return " · ".join(words)


def write(path: Path, rows: list[dict[str, object]], runs: Sequence[Run], **more: object) -> None:
    """Write the rows of a table and the `origin` of its runs."""
    write_json(path, more | {"rows": rows, "manifest": origin(runs)})


def read(name: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table that `write` wrote, such as `sweeps/trends`, and its origin. Raises `InputError` when there is none."""
    try:
        content = json.loads((FOLDER / f"{name}.json").read_text())
    except OSError:
        there = [p.relative_to(FOLDER).with_suffix("") for p in sorted(FOLDER.glob("*/*.json"))]
        raise unknown("kept table", name, there) from None
    return pd.DataFrame(content["rows"]), content["manifest"]
