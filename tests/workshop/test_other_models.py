"""The three paths of the page `other_models`, each by its example in `book/examples`; reports; sweeps."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lddyn import InputError, __main__
from lddyn.data import preferences
from lddyn.engine import store
from lddyn.workshop import launch, report, sweep

EXAMPLES = store.ROOT / "book" / "examples"
WORDS = {
    "n_train": 12, "n_probe": 3, "n_probe_test": 2, "epochs": 2, "evaluations": 3, "batch_size": 4, "lr": 5e-3,
    "max_prompt": 16, "max_response": 16,
}  # fmt: skip
OPTIONS = [word for name, value in WORDS.items() for word in ("--set", name, str(value))]


@pytest.fixture
def data(pairs, jsonl):
    return jsonl(pairs(18, test=6), "pairs.jsonl")


def example(command, **environment):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=store.ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_lines_in_a_trl_script_give_curves_and_scorecard(model_folder, data, tmp_path):
    model = str(model_folder("llama"))
    out = example([sys.executable, EXAMPLES / "my_trainer.py", model, str(data), str(tmp_path / "mine")])
    assert "29  holds" in out and "40  not measured" in out
    html = (tmp_path / "mine" / "report.html").read_text()
    assert "<svg" in html and "http" not in html.split("</svg>")[1] and "one seed" in html


@pytest.mark.slow
def test_the_script_that_ships_trains_what_trl_dpo_trains_and_probes_it(model_folder, pairs, tmp_path):
    (tmp_path / "data").mkdir()
    for split, rows in (("train", pairs(12)), ("test", pairs(18)[12:])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": str(model_folder("llama")), "dataset_name": str(tmp_path / "data")}
    settings |= {"output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 4}
    settings |= {"learning_rate": 1e-3, "use_cpu": True, "bf16": False, "report_to": "none"}
    (tmp_path / "dpo.yml").write_text(yaml.safe_dump(settings))
    cache = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = ["--config", str(tmp_path / "dpo.yml")]
    example([sys.executable, EXAMPLES / "trl_dpo_with_probes.py", *words], **cache)
    example([sys.executable, "-m", "trl.scripts.dpo", *words, "--output_dir", str(tmp_path / "plain")], **cache)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    run = store.load(tmp_path / "out" / "probes")
    assert run.table.step.unique().tolist() == [0, 3]
    assert set(run.table.prompt_id.str.partition("/")[0]) == {"train", "test"}
    logged = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in logged if "lddyn/change/chosen" in row] == [0, 3]


@pytest.mark.slow
def test_own_pairs_gain_rephrasings_and_another_model_is_one_parameter(model_folder, data, serve):
    def answer(path, headers, body):
        text = json.loads(body)["messages"][0]["content"].split("Text: ")[1].split("\n")[0]
        choice = {"message": {"content": " ".join(reversed(text.split()))}}
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    environment = {"CHAT": "endpoint", "LDDYN_API_URL": f"{serve(answer)}/v1", "LDDYN_API_MODEL": "m", "no_proxy": "*"}
    model = str(model_folder("gpt_neox"))
    out = example(["bash", EXAMPLES / "my_data.sh", str(data), *OPTIONS], MODEL=model, **environment)
    assert "72 answers, 0 of no use; rows kept: 12 train, 6 test" in out
    assert "chosen_semantic" in preferences.load(str(data.with_suffix(".all.jsonl")))[0]
    pages = [Path(line) for line in out.splitlines() if line.endswith("report.html")]
    assert "20  holds" in out and "29  " in out and all("<svg" in page.read_text() for page in pages)
    started = json.loads((pages[1].parent / "manifest.json").read_text())["parameters"]["start"]
    assert started == f"{pages[0].parent}/model"


# --- reports -----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(model_folder, data):
    """Folders of the same small SFT with two seeds."""
    words = WORDS | {"model": str(model_folder("gpt_neox")), "data": str(data)}
    return [launch.train((), words | {"seed": seed}).folder for seed in (0, 1)]


def test_one_run_says_what_holds_and_two_have_intervals(trained, capsys):
    assert __main__.main(["report", str(trained[0])]) == 0
    assert "20  holds" in capsys.readouterr().out
    assert __main__.main(["report", *map(str, trained), "--out", str(trained[0] / "both.html")]) == 0
    assert "95% intervals" in (trained[0] / "both.html").read_text()
    assert {e["verdict"] for e in report.scorecard(report.read(trained), "sft")} <= {
        "holds", "fails", "undecided", "partly", "not measured",
    }  # fmt: skip


def test_a_claim_that_a_run_cannot_tell_is_not_measured(trained):
    by_id = {e["id"]: e for e in report.scorecard(report.read(trained[:1]), "sft")}
    assert by_id[26]["verdict"] == by_id[27]["verdict"] == "not measured", "they need runs on other targets"


def test_a_report_needs_a_record_and_a_method(trained, tmp_path, capsys):
    assert __main__.main(["report", str(tmp_path / "nothing")]) == 1
    assert "unreadable record" in capsys.readouterr().err
    manifest = json.loads((trained[0] / "manifest.json").read_text())
    manifest |= {"function": "lddyn.engine.training:ProbeCallback", "parameters": {"seed": 0}}
    (trained[0] / "manifest.json").write_text(json.dumps(manifest))
    assert __main__.main(["report", str(trained[0])]) == 2
    assert "add --method sft or --method dpo" in capsys.readouterr().err
    assert __main__.main(["report", str(trained[0]), "--method", "ppo"]) == 2
    assert "unknown method 'ppo'" in capsys.readouterr().err


# --- sweeps ------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(model_folder, data, tmp_path):
    path = tmp_path / "plan.yml"
    shared = WORDS | {"model": str(model_folder("gpt_neox")), "data": str(data)}
    over = {"lr": ["1e-3", 1e-2], "seed": [0]}
    path.write_text(yaml.safe_dump({"set": shared, "over": over, "statistics": ["sft_chosen_change"]}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("engine", sweep.ENGINES)
def test_every_engine_gives_the_same_table(plan, engine, tmp_path):
    if engine != "processes":
        pytest.importorskip({"dask": "distributed"}.get(engine, engine))
    out = tmp_path / "table.json"
    assert "sft_chosen_change" in sweep.sweep(plan, engine, workers=1, out=out)
    recorded = json.loads(out.read_text())
    rows = recorded["rows"]
    assert [(row["lr"], row["seed"]) for row in rows] == [(1e-3, 0), (1e-2, 0)]
    assert len(recorded["manifest"]["runs"]) == 2
    assert all(row["chosen"] > 0 and row["parameters"] == rows[0]["parameters"] for row in rows)
    with ThreadPoolExecutor(1) as threads:
        again = sweep.run_all([launch.job(each) for each in sweep.combinations(sweep.read(plan))], threads)
    assert [run.folder.name for run in again] == recorded["manifest"]["runs"]
    assert sum(run.manifest["seconds"] for run in again) == pytest.approx(recorded["manifest"]["seconds"], abs=0.1)


def test_a_sweep_keeps_what_finished_when_a_run_fails(plan, pairs, jsonl, runs_folder):
    content = yaml.safe_load(plan.read_text())
    content["over"] = {"max_prompt": [16, 400]}
    plan.write_text(yaml.safe_dump(content))
    rows = pairs(18, test=6)
    jsonl([row | {"prompt": rows[0]["prompt"] * 20 + row["prompt"]} for row in rows], "pairs.jsonl")
    jobs = [launch.job(each) for each in sweep.combinations(sweep.read(plan))]
    with ThreadPoolExecutor(1) as threads, pytest.raises(InputError, match="the model takes 256"):
        sweep.run_all(jobs[::-1], threads)
    assert len(list(runs_folder.glob("tune.tune-*/table.parquet"))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"over": {"lr": []}}, "`over` must map settings to lists"),
        ({"over": {"rate": [1]}}, "unknown parameter of train 'rate'"),
        ({"over": {"lr": ["fast"]}}, "parameter lr takes"),
        ({"over": {"seed": [0]}, "engine": "dask"}, "unknown key of bad.yml 'engine'"),
        ({"over": {"seed": [0]}, "statistics": ["chosen"]}, "has no statistic 'chosen'"),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_runs(content, message, tmp_path, runs_folder, capsys):
    path = tmp_path / "bad.yml"
    path.write_text(yaml.safe_dump(content))
    assert __main__.main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not runs_folder.exists()


def test_an_unknown_or_missing_engine_is_one_line(plan, monkeypatch, capsys):
    assert __main__.main(["sweep", str(plan), "--engine", "ray"]) == 2
    assert "unknown engine 'ray'" in capsys.readouterr().err
    if importlib.util.find_spec("distributed"):
        assert __main__.main(["sweep", str(plan), "--engine", "dask", "--address", "nowhere"]) == 2
        assert "no dask scheduler at 'nowhere'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert __main__.main(["sweep", str(plan), "--engine", "submitit"]) == 2
    assert "pip install 'lddyn[sweep]'" in capsys.readouterr().err


def test_the_page_of_sweeps_shows_tables_and_says_what_was_not_recorded():
    page = sweep.sections()
    recorded = [path for path, result in sweep.recorded() if result]
    assert page.count("*Not recorded.*") == len(sweep.recorded()) - len(recorded)
    for path in sorted(sweep.FOLDER.glob("*.yml")):
        assert f"book/sweeps/{path.name}" in page
        assert sweep.combinations(sweep.read(path))
