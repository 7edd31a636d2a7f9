"""Training of one's own model: alone, on two processes, with LoRA; settings and refusals."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import trl
import yaml

from lddyn import __main__
from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.sft import run as sft
from lddyn.engine import models, store
from lddyn.engine.settings import derive
from lddyn.workshop import estimate, launch, tune

KEYS = ["step", "examples", "prompt_id", "response_type", "metric"]
SMALL = {
    "n_train": 20, "n_probe": 3, "n_probe_test": 2, "epochs": 3, "evaluations": 3, "batch_size": 4, "lr": 5e-3,
    "max_prompt": 16, "max_response": 16, "warmup": 3, "seed": 7,
}  # fmt: skip


@pytest.fixture
def small(model_folder, pairs, jsonl):
    """Settings of a training that takes seconds."""
    return SMALL | {"model": str(model_folder("gpt_neox")), "data": str(jsonl(pairs(26, test=6, kinds=["unrelated"])))}


def same(one, other, tolerance=0.0):
    both = one.astype({k: str for k in KEYS[2:]}).merge(other.astype({k: str for k in KEYS[2:]}), on=KEYS)
    assert len(both) == len(one) == len(other)
    assert (both.value_x - both.value_y).abs().max() <= tolerance


@pytest.mark.filterwarnings("ignore::lddyn.Caution")
def test_it_is_the_training_of_chapter_3(small, tmp_path):
    s, _ = launch.job(launch.settings((), small | {"method": "sft"}))
    mine = tune.tune(tmp_path / "mine" / "work", s)
    theirs = derive(sft.Finetune, s, target="chosen", generate=0)
    same(mine, sft.finetune(tmp_path / "theirs" / "work", theirs))


@pytest.mark.filterwarnings("ignore::lddyn.Caution")
def test_it_is_the_training_of_chapter_5(small, tmp_path):
    s, _ = launch.job(launch.settings((), small | {"method": "dpo"}))
    mine = tune.tune(tmp_path / "mine" / "work", s)
    from_the_model = {"stage": "", "sft_epochs": 0, "generate": 0, "account": 0}
    theirs = derive(dpo.Align, s, **from_the_model, pairs="as_written", measure="all")
    same(mine, dpo.align(tmp_path / "theirs" / "work", theirs))


SHARDED = (str(Path(__file__).with_name("sharded.py")),)


def launched(words, tmp_path, program=("-m", "lddyn"), **environment):
    """`train` on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    options = [w for key, value in words.items() for w in ("--set", key, str(value))]
    environment = os.environ | {"LDDYN_RUNS": str(tmp_path / "of-two"), "OMP_NUM_THREADS": "1"} | environment
    command += ["train", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=store.ROOT, env=environment, timeout=600)


def fsdp2() -> dict[str, str]:
    """What `accelerate launch` makes of TRL's own file for FSDP2."""
    file = Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml"
    config = yaml.safe_load(file.read_text())
    words = {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    return words | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": config["mixed_precision"]}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_give_the_numbers_of_one_and_one_record(small, tmp_path, method, sharded):
    words = small | {"method": method, "accumulation": 1}
    if sharded:
        assert launched(words, tmp_path, SHARDED, **fsdp2(), STOP_AT="11").returncode, "breaks off, goes on below"
    done = launched(words, tmp_path, SHARDED, **fsdp2()) if sharded else launched(words, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    both = store.load(folder)
    assert [p.name for p in folder.parent.glob("*/manifest.json")] == ["manifest.json"], "one record, written once"
    assert both.manifest["processes"] == 2 and done.stdout.count("at most about") == 1
    alone = launch.train((), words)
    close(both.table, alone.table)
    losses = both.table[both.table.prompt_id == "batch"]
    assert {"train_loss", "grad_norm"} <= set(losses.metric) and ("train_margin" in set(losses.metric)) == (
        method == "dpo"
    )
    models.load(str(folder / "model"))


def close(one, other):
    """Equal to rounding: log-probabilities to 0.001 nats; ranks of near ties may swap."""
    drop = one[one.metric != "rank_mean"]
    same(drop, other[other.metric != "rank_mean"], 2e-3)


def test_a_batch_in_parts_gives_the_numbers_of_the_whole(small):
    whole = launch.train((), small)
    parts = launch.train((), small | {"accumulation": 4, "probe_tokens": 64})
    kept = [run.table[run.table.prompt_id != "batch"] for run in (whole, parts)]
    close(*kept)


def test_a_second_call_reads_the_record_and_a_start_is_where_training_starts(small):
    first = launch.train((), small)
    assert launch.train((), small).manifest == first.manifest
    second = launch.train((), small | {"method": "dpo", "start": str(first.folder / "model"), "epochs": 1})
    ends, starts = (t[(t.metric == "logp_sum") & (t.response_type == "chosen")] for t in (first.table, second.table))
    ends, starts = ends[ends.step == ends.step.max()], starts[starts.step == 0]
    assert sorted(ends.value) == pytest.approx(sorted(starts.value), abs=1e-3)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_lora_trains_few_weights_from_the_same_start_and_saves_a_whole_model(small, method):
    words = small | {"method": method, "epochs": 2}
    whole = launch.train((), words)
    run = launch.train((), words | {"lora": 2})
    at = [t[(t.metric == "logp_sum") & (t.step == 0)] for t in (whole.table, run.table)]
    same(*at, 1e-4)
    last = run.table[(run.table.metric == "logp_sum") & (run.table.step == run.table.step.max())]
    assert (last.value.to_numpy() != at[1].value.to_numpy()).all()
    model, _ = models.load(str(run.folder / "model"))
    base, _ = models.load(small["model"])
    assert list(model.state_dict()) == list(base.state_dict())
    embeddings = [m.get_input_embeddings().weight for m in (model, base)]
    assert (embeddings[0] == embeddings[1]).all(), "LoRA leaves the embeddings as they are"


def test_probes_see_full_precision_while_training_computes_in_bfloat16(small, recwarn):
    at = [
        launch.train((), small | {"bf16": on}).table.query("metric == 'logp_sum' and step == 0") for on in (False, True)
    ]
    same(*at)
    assert not [w for w in recwarn if "cannot share" in str(w.message)]


def test_text_in_yaml_becomes_a_number_and_later_files_win(tmp_path):
    one, two = tmp_path / "one.yml", tmp_path / "two.yml"
    one.write_text("lr: 5e-7\nepochs: 3\n")
    two.write_text("epochs: 4\n")
    assert isinstance(yaml.safe_load(one.read_text())["lr"], str), "what YAML makes of 5e-7"
    chosen = launch.settings([str(one), str(two)], {"seed": "3"})
    assert (chosen.lr, chosen.epochs, chosen.seed) == (5e-7, 4.0, 3)


@pytest.mark.parametrize("name", sorted(p.stem for p in launch.FILES.glob("*.yml") if p.stem != "architectures"))
def test_every_file_of_settings_is_valid_and_its_model_is_known(name):
    chosen = launch.settings(["pythia-410m", name] if name in ("bf16", "lora") else [name], {"method": "dpo"})
    assert chosen.model in estimate.known()
    if name not in ("bf16", "lora"):
        assert (chosen.lr, chosen.optimizer, chosen.batch_size, chosen.warmup) == (5e-7, "rmsprop", 4, 150)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "learning_rate", "1"], "unknown parameter of train 'learning_rate'"),
        (["--set", "lr", "fast"], "parameter lr takes float or none in (0, 10], not 'fast'"),
        (["--set", "method", "ppo"], "one of {sft, dpo}, not 'ppo'"),
        (["--set", "batch_size", "6", "--set", "accumulation", "4"], "the next one that does is 8"),
        (["--set", "size", "100x3"], "unknown size '100x3'"),
        (["--set", "start", "nowhere"], "no model folder 'nowhere'"),
        (["pythia-1.4"], "unknown settings 'pythia-1.4'; did you mean 'pythia-1.4b'"),
        (["no.yml"], "unknown settings 'no.yml'"),
        (["--set", "model", "./nowhere"], "cannot read the configuration of './nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, capsys):
    assert __main__.main(["train", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP 1 is not supported; write fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, [], "at least two processes"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}, ["--set", "lora", "2"], "adapters"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused_in_one_line(monkeypatch, capsys, environment, words, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert __main__.main(["train", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.slow
def test_nothing_is_sharded_without_a_gpu_and_that_is_said(small, tmp_path):
    done = launched(small, tmp_path, **fsdp2())
    assert done.returncode and "lddyn: accelerate shards on GPUs only" in done.stderr


def test_the_settings_say_the_precision_not_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch._settle_with_launcher(launch.settings(), world=2)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_errors_of_all_processes_are_told_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert __main__.main(["train", "--set", "lr", "0"]) == 2
    assert capsys.readouterr().err == ""


def test_every_parameter_of_train_reaches_its_function():
    assert {f.name for f in fields(launch.Launch)} == set(launch.PARAMETERS)
