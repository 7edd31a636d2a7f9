"""Bad input of every kind: one line that says what, where and what is allowed; exit code 2; nothing is lost."""

import json
import os
import re
import subprocess

import pytest

from lddyn import InputError
from lddyn.__main__ import main
from lddyn.chapters import claims
from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.sft import run as sft
from lddyn.data import images, preferences
from lddyn.engine import cache, models, store
from lddyn.engine.probe_set import ProbeSet
from lddyn.publish import notebooks

ROW = {"prompt": "How?", "chosen": " So.", "rejected": " Not so."}


def rows(path, *changes):
    path.write_text("".join(json.dumps(ROW | change) + "\n" for change in changes))
    return str(path)


def without_weights(folder, model_folder):
    broken = folder / "broken"
    broken.mkdir()
    for file in model_folder("gpt_neox").iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    return broken


COMMANDS = {
    "a command that is not there": (["rum", "01_mnist"], "invalid choice: 'rum'"),
    "no command": ([], "required: COMMAND"),
    "a misspelt notebook": (["run", "01_mnits"], "did you mean '01_mnist'?"),
    "a file that is no notebook": (["run", "{tmp}/text.ipynb"], "is not a notebook"),
    "a misspelt parameter": (["run", "03_sft", "-p", "epoch", "3"], "did you mean 'epochs'?"),
    "a word for a number": (["run", "03_sft", "-p", "lr", "fast"], "lr takes float or none in (0, 1], not 'fast'"),
    "a number out of range": (["run", "03_sft", "-p", "lr", "7"], "lr takes float or none in (0, 1], not '7'"),
    "not a number": (["run", "03_sft", "-p", "lr", "nan"], "not 'nan'"),
    "half a seed": (["run", "03_sft", "-p", "seeds", "2.5"], "seeds takes int or none in [1, 100], not '2.5'"),
    "an unknown choice": (["run", "03_sft", "-p", "optimizer", "adam"], "one of {adamw, rmsprop, sgd}, not 'adam'"),
    "an unknown scale": (["run", "03_sft", "--scale", "huge"], "one of {smoke, laptop, pretrained, paper}, not 'huge'"),
    "an unknown scale of the book": (["book", "--scale", "hugr"], "unknown scale 'hugr'"),
    "a parameter file that is not there": (["run", "03_sft", "--params", "{tmp}/none.yml"], "cannot read parameters"),
    "a parameter file that is no YAML": (["run", "03_sft", "--params", "{tmp}/broken.yml"], "cannot read parameters"),
    "a parameter file with a list": (["run", "03_sft", "--params", "{tmp}/list.yml"], "must map parameter names"),
    "a place that cannot be written": (["run", "03_sft", "--out", "/dev/null/x.ipynb"], "cannot write the notebook"),
    "a folder as output": (["run", "03_sft", "--out", "{tmp}"], "it is a folder"),
    "an unknown loss": (["train", "--set", "method", "dpo", "--set", "loss", "gate"], "did you mean 'gated'?"),
    "no tokens": (["rephrase", "x", "y", "--max-tokens", "0"], "--max-tokens: takes a whole number from 1"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_bad_command_line_starts_nothing(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", lambda *a: pytest.fail("something was started"))
    (tmp_path / "text.ipynb").write_text("hello")
    (tmp_path / "broken.yml").write_text("lr: [1,\n")
    (tmp_path / "list.yml").write_text("- lr\n")
    words, message = COMMANDS[case]
    try:
        code = main([word.format(tmp=tmp_path) for word in words])
    except SystemExit as error:  # argparse's own
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err
    assert err.startswith("usage") or err.count("\n") == 1


CALLS = {
    "a model folder that is not there": (lambda t, m: models.load("./nowhere"), "there is no model folder './nowhere'"),
    "a hub id without a network": (lambda t, m: models.load("nobody/nothing"), "hf download nobody/nothing"),
    "a model folder without weights": (lambda t, m: models.load(str(without_weights(t, m))), "model*.safetensors"),
    "a device that is none": (lambda t, m: models.load(str(m("gpt_neox")), device="gpu"), "unknown device 'gpu'"),
    "a precision that is none": (lambda t, m: models.load(str(m("gpt_neox")), dtype="fp8"), "unknown dtype 'fp8'"),
    "a size that is none": (lambda t, m: models.builtin("smal"), "did you mean 'small'?"),
    "a scale that is none": (lambda t, m: sft.settings("smok", {}), "did you mean 'smoke'?"),
    "data that are not there": (lambda t, m: preferences.load(str(t / "no.jsonl"), "train"), "no.jsonl"),
    "a missing field": (
        lambda t, m: preferences.load(rows(t / "d.jsonl", {}, {"chosen": None}), "train"), "line 2: no field 'chosen'",
    ),
    "an empty answer": (
        lambda t, m: preferences.load(rows(t / "d.jsonl", {}, {"rejected": " "}), "train"), "line 2: rejected is empty",
    ),
    "equal answers": (
        lambda t, m: preferences.load(rows(t / "d.jsonl", {"rejected": " So."}), "train"),
        "line 1: chosen and rejected are equal",
    ),
    "an answer that is a number": (
        lambda t, m: preferences.load(rows(t / "d.jsonl", {"chosen": 3}), "train"), "line 1: chosen is of type int",
    ),
    "pairs that are none": (lambda t, m: dpo.paired([ROW], "swaped"), "did you mean 'swapped'?"),
    "pairs that the data lack": (lambda t, m: dpo.paired([ROW], "rephrase"), "which the data lacks"),
    "probes that are no JSON": (
        lambda t, m: ProbeSet.from_jsonl((t / "p.jsonl").write_text("{") and t / "p.jsonl"), "invalid JSON",
    ),
    "images in a broken archive": (
        lambda t, m: images.read_idx((t / "i.gz").write_bytes(b"\x1f\x8b") and t / "i.gz"), "not a complete gzip file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_model_or_data_set_is_named(case, tmp_path, model_folder):
    call, message = CALLS[case]
    with pytest.raises(InputError) as raised:
        call(tmp_path, model_folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


PART = "chapter: 03_sft\n  parts: [{{statistic: {}, holds: {}, says: x}}]"
LEDGERS = {
    "a statistic that is not there": (PART.format("no_such", "'> 0'"), "chapter 03_sft has no statistic 'no_such'"),
    "a rule that cannot be read": (PART.format("bell_rise", "above 0"), "rule 'above 0' is not"),
    "a chapter that is not there": (
        PART.replace("03", "33").format("a", "b").replace("sft", "no"),
        "no chapter '33_no'",
    ),
    "a number out of order": ("id: 7", "claim 7: needs id (in order)"),
}


@pytest.mark.parametrize("case", LEDGERS)
def test_a_broken_ledger_names_the_claim(case, tmp_path, monkeypatch, capsys):
    text, message = LEDGERS[case]
    head = "" if text.startswith("id") else "id: 1\n  "
    (tmp_path / "claims.yml").write_text(f"- {head}{text}\n  claim: c\n  source: s\n  paper: p\n")
    monkeypatch.setattr(claims, "LEDGER", tmp_path / "claims.yml")
    claims.ledger.cache_clear()
    assert main(["claims"]) == 2
    claims.ledger.cache_clear()
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_runs_that_cannot_be_written_stop_before_anything_is_computed(monkeypatch):
    monkeypatch.setenv("LDDYN_RUNS", "/dev/null/runs")
    with pytest.raises(store.RecordError, match="cannot write in /dev/null/runs"):
        cache.run(lambda work: pytest.fail("computed"), {})


def test_a_damaged_record_is_not_plotted(tmp_path):
    (tmp_path / "manifest.json").write_text('{"finished": "now", "table_sha256": "0"}')
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(store.RecordError, match="damaged"):
        store.load(tmp_path)


def test_a_python_that_is_not_there_is_one_line():
    done = subprocess.run(
        ["make", "env", "PYTHON=python0", "VENV=.no-such-environment"],
        cwd=store.ROOT, capture_output=True, text=True, env=os.environ | {"MAKEFLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 2 and re.search(r"lddyn: 'python0' not found; install Python 3.11", done.stderr)


def test_what_a_notebook_refuses_is_one_line_and_exit_code_2(tmp_path, capsys):
    words = ["run", "03_sft", "--scale", "smoke", "-p", "model", "./nowhere", "--out", str(tmp_path / "x.ipynb")]
    assert main(words) == 2
    expectation, refusal = capsys.readouterr().err.splitlines()
    assert "here with its defaults" in expectation and "there is no model folder './nowhere'" in refusal


def test_a_pdf_without_a_browser_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["pdf"]) == 2
    err = capsys.readouterr().err
    assert "printed by a browser, and none is installed (any of chromium" in err and err.count("\n") == 1
