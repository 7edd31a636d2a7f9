"""What an edit makes stale: a chapter's own notebook and runs, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lddyn.chapters import sentences
from lddyn.engine import store
from lddyn.publish import build, notebooks, pages

SCRIPT = """
import json
from lddyn.engine import cache, reach
from lddyn.publish import build, notebooks, pages
runs = {"sft": "finetune", "dpo": "align", "digits": "train", "extend": "follow"}
keys = {name: reach.definitions(f"lddyn.chapters.{name}.run", run) for name, run in runs.items()}
books = {n: build.fingerprint(notebooks.notebook_path(n), "smoke") for n in pages.chapters()}
print(json.dumps({"runs": keys, "notebooks": books}))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what fingerprints are made of."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("lddyn", "notebooks"):
        shutil.copytree(store.ROOT / name, folder / name, ignore=shutil.ignore_patterns("models", "__pycache__"))
    (folder / "book").mkdir()
    for name in ("pyproject.toml", "book/_toc.yml", "book/claims.yml"):
        shutil.copy(store.ROOT / name, folder / name)
    return folder


def state(folder: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def before(clone):
    return state(clone)


def stale_after(clone: Path, before: dict, *edits: tuple[str, str, str]) -> tuple[list[str], list[str]]:
    """Notebooks and runs that edits (file, old, new) make stale; they are taken back."""
    texts = {file: (clone / file).read_text() for file, _, _ in edits}
    try:
        for file, old, new in edits:
            text = (clone / file).read_text()
            assert old in text
            (clone / file).write_text(text.replace(old, new, 1))
        after = state(clone)
    finally:
        for file, text in texts.items():
            (clone / file).write_text(text)
    return tuple([n for n in before[kind] if before[kind][n] != after[kind][n]] for kind in ("notebooks", "runs"))


@pytest.mark.slow
def test_a_colour_of_one_chapter_runs_one_notebook_and_no_run(clone, before):
    edit = ("lddyn/chapters/dpo/figures.py", "color=GREY", "color=BLUE")
    assert stale_after(clone, before, edit) == (["05_dpo"], [])


@pytest.mark.slow
def test_a_rule_makes_only_the_notebooks_stale_that_it_judges(clone, before):
    rules = yaml.safe_load((store.ROOT / "book" / "claims.yml").read_text())
    own = next(rule for rule in rules if {p.get("chapter", rule["chapter"]) for p in rule["parts"]} == {"06_variants"})
    edit = ("book/claims.yml", f"id: {own['id']}\n", f"id: {own['id']}\n  note: x\n")
    assert stale_after(clone, before, edit) == (["06_variants"], [])


@pytest.mark.slow
def test_words_of_the_status_the_cache_and_docstrings_make_nothing_stale(clone, before):
    edits = (
        ("lddyn/publish/status.py", '"damaged"', '"broken"'),
        ("lddyn/engine/cache.py", "computing it again", "making it again"),
        ("lddyn/chapters/sft/run.py", '"""The runs of', '"""All runs of'),
    )
    assert stale_after(clone, before, *edits) == ([], [])


@pytest.mark.slow
def test_the_engine_makes_those_runs_stale_that_reach_it(clone, before):
    notebooks, runs = stale_after(clone, before, ("lddyn/engine/probes.py", '"cpu": 2048', '"cpu": 1024'))
    assert runs == ["sft", "dpo", "extend"] and "01_mnist" not in notebooks and "03_sft" in notebooks


@pytest.mark.slow
def test_pre_training_makes_nothing_stale_but_the_weights_that_come_out_of_it_do(clone, before):
    edit = ("lddyn/engine/pretraining.py", "betas=(0.9, 0.99)", "betas=(0.9, 0.95)")
    assert stale_after(clone, before, edit) == ([], [])
    weights = clone / "lddyn" / "data" / "models" / "tiny" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    try:
        weights.write_bytes(b"other")
        after = state(clone)
    finally:
        shutil.rmtree(clone / "lddyn" / "data" / "models")
    changed = [name for name in before["notebooks"] if before["notebooks"][name] != after["notebooks"][name]]
    assert changed == [name for name in pages.chapters() if name not in ("01_mnist", "04_squeezing")]


@pytest.mark.slow
def test_every_notebook_is_in_the_book(before):
    assert list(before["notebooks"]) == pages.chapters()


@pytest.mark.parametrize("name", pages.chapters())
def test_a_notebook_reaches_at_most_25_files_and_no_other_chapter(name):
    code, _ = build.reached(notebooks.notebook_path(name))
    files = {each.partition(":")[0] if ":" in each else each.rpartition(".")[0] for each in code}
    assert len(files) <= 25, sorted(files)
    chapters = {file.split(".")[2] for file in files if file.startswith("lddyn.chapters.") and file.count(".") == 3}
    assert chapters == {sentences.room(name)}
