"""Runs that take long, kept beside the code: table, manifest and answers of each, as every reader's book draws them.

    book/recorded/runs/05_dpo/after_sft/seed-10-4f1c09aa/     table.parquet, manifest.json, answers.json

The folder of a run is named by its settings alone: made again by other code, it takes the place of what was there.
"""

import hashlib
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from lddyn.engine import store

FOLDER = store.BOOK / "recorded" / "runs"
CARD = FOLDER / "card.json"  # rows of the model card
REPLICATES = store.BOOK / "recorded" / "replicates.json"  # runs with other bases and other data
SCALE = "pretrained"
JUDGED = {  # what claims are judged by on the real model, of each chapter
    "02_decomposition": ("main",),
    "03_sft": ("main", "map"),
    "05_dpo": ("after_sft", "short"),
    "07_extend": ("natural",),
}
KEYS = ["step", "prompt_id", "response_type", "metric"]


def write(run: store.Run, chapter: str, group: str) -> Path:
    """Keep a run under its chapter, what it belongs to there, and its settings; returns the folder.

    Values are rounded to float32. The manifest loses what only the cache needs: hashes of definitions, and where on
    this machine things lie.
    """
    settings = _portable(run.manifest["parameters"])
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = FOLDER / chapter / group / f"seed-{settings['seed']}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    table = run.table.astype({"value": "float32", "step": "int32", "examples": "int32"})
    store.write_atomically(
        folder / "table.parquet", lambda p: table.to_parquet(p, index=False, compression="zstd", compression_level=19)
    )
    if (run.folder / "answers.json").exists():
        shutil.copyfile(run.folder / "answers.json", folder / "answers.json")
    manifest = {k: v for k, v in run.manifest.items() if k != "code"}
    manifest["inputs"] = {name: {"sha256": file["sha256"]} for name, file in manifest["inputs"].items()}
    manifest["table_sha256"] = store.file_hash(folder / "table.parquet")
    store.write_json(folder / "manifest.json", _portable(manifest))
    return folder


def _portable(content: dict[str, Any]) -> dict[str, Any]:
    """The same without this machine's paths, and without the keys of the runs that a run began from."""
    text = json.dumps(content)
    for place, name in ((store.runs_root(), "runs"), (store.PACKAGE, "lddyn")):
        text = text.replace(json.dumps(str(place))[1:-1], name)
    portable: dict[str, Any] = json.loads(re.sub(r"(runs/[a-z.]+)-[0-9a-f]{12}", r"\1", text))
    return portable


def read(chapter: str, *groups: str) -> list[store.Run]:
    """The kept runs of a chapter that belong to these groups, in the order of seeds; none where none is kept."""
    found = [store.load(path.parent) for group in groups for path in (FOLDER / chapter / group).glob("*/manifest.json")]
    wide = [run._replace(table=run.table.astype({"value": "float64"})) for run in found]
    return sorted(wide, key=lambda run: (run.manifest["parameters"]["seed"], run.folder.name))


def published(*chapters: str) -> dict[str, dict[str, Any]]:
    """What claims are judged by on the real model, of some chapters or all: chapter -> scale and runs that are kept."""
    found = {chapter: read(chapter, *JUDGED[chapter]) for chapter in chapters or JUDGED}
    return {chapter: {"scale": SCALE, "runs": runs} for chapter, runs in found.items() if runs}


@cache
def replicates() -> list[dict[str, Any]]:
    """What runs with other bases and data say: `base, data, chapter, values` (by `released.key`) of each."""
    rows: list[dict[str, Any]] = json.loads(REPLICATES.read_text())["rows"] if REPLICATES.exists() else []
    return rows


def hashes(chapter: str) -> dict[str, str]:
    """Hashes of all files that are kept for a chapter."""
    files = sorted(path for path in (FOLDER / chapter).rglob("*") if path.is_file())
    return {str(path.relative_to(FOLDER)): store.file_hash(path) for path in files}


def compare(run: store.Run, chapter: str, group: str) -> str:
    """How far a run is from the kept one with its settings, in words: the largest difference of a log-probability."""
    kept = [k for k in read(chapter, group) if k.manifest["parameters"] == _portable(run.manifest["parameters"])]
    if not kept:
        return "not recorded before"
    shown = ("logp_sum", "argmax_logp_sum")
    then, now = (r.table[r.table.metric.isin(shown)].set_index(KEYS).value for r in (kept[0], run))
    return f"at most {(now - then).abs().max():.2g} nats from the recorded one, summed over a response"
