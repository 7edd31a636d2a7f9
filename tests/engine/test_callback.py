"""The callback in other people's trainers: it never takes a training down, and says what it could not measure."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerState
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from lddyn import Caution, InputError
from lddyn.engine import models, store
from lddyn.engine.callback import ProbeCallback, read
from lddyn.engine.probe_set import ProbeSet

PAIRS = [
    {"prompt": f"Question: which {i}?\nAnswer:", "chosen": f" It is {i}.", "rejected": f" No {i}."} for i in range(8)
]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:trl", "ignore:.*:UserWarning:torch")


@pytest.fixture(scope="module")
def small(model_folder):
    return models.read(str(model_folder("llama")))


def callback(**options) -> ProbeCallback:
    some = PAIRS[:3]
    probes = ProbeSet([p["prompt"] for p in some], {k: [p[k] for p in some] for k in ("chosen", "rejected")})
    return ProbeCallback(probes, **{"every": 2, "thresholds": None} | options)


def trained(small, folder: Path, *callbacks, resume=None, calls: int = 1, tokenizer=None, **options):
    model, own = small
    common = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    common |= {"bf16": False, "learning_rate": 1e-2, "save_strategy": "no", "max_steps": 4, "output_dir": str(folder)}
    policy = models.snapshot(model).requires_grad_(True)
    trainer = DPOTrainer(
        policy,
        ref_model=models.snapshot(model),
        args=DPOConfig(**common | options),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer or own,
        callbacks=list(callbacks),
    )
    for _ in range(calls):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_checkpoint_that_was_made_without_it_begins_the_table_there_and_says_so(small, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(small, tmp_path / "run", **saving)
    probes = callback(output_dir=tmp_path / "out")
    with pytest.warns(Caution, match="goes on at step 4 from a checkpoint without probes"):
        trained(small, tmp_path / "run", probes, resume=True, **saving | {"max_steps": 6})
    assert probes.table().step.unique().tolist() == [4, 6]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["since"] == 4


def test_a_resumption_from_another_folder_finds_what_was_measured_before(small, tmp_path):
    out = tmp_path / "out"
    trained(small, tmp_path / "one", callback(output_dir=out), save_strategy="steps", save_steps=4)
    probes = callback(output_dir=out)
    (tmp_path / "one" / "checkpoint-4" / "probes.parquet").unlink()
    parts = out / "parts"
    parts.mkdir()
    for step, part in store.load(out).table.groupby("step"):
        part.to_parquet(parts / f"step-{step:09d}.parquet", index=False)
    trained(small, tmp_path / "two", probes, resume=str(tmp_path / "one" / "checkpoint-4"), max_steps=6)
    assert probes.table().step.unique().tolist() == [0, 2, 4, 6]


def test_a_second_training_begins_a_new_table(small, tmp_path):
    probes = callback(output_dir=tmp_path / "out")
    trained(small, tmp_path, probes, calls=2, max_steps=2)
    table = probes.table()
    assert table[table.metric == "logp_sum"].groupby("step").size().to_dict() == {0: 6, 2: 6}
    assert store.load(tmp_path / "out").table.step.max() == 2


def test_a_model_that_diverges_ends_the_probes_and_not_the_training(small, tmp_path):
    probes, end = callback(output_dir=tmp_path / "out"), ProbeCallback.on_step_end

    def poison(self, args, state, control, model=None, **more):
        if state.global_step == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return end(self, args, state, control, model=model, **more)

    probes.on_step_end = types.MethodType(poison, probes)
    with pytest.warns(Caution, match="measures no more since step 4: the model has diverged"):
        trainer = trained(small, tmp_path, probes, max_steps=6)
    assert trainer.state.global_step == 6
    run = store.load(tmp_path / "out")
    assert run.table.step.unique().tolist() == [0, 2] and "diverged" in run.manifest["cautions"][0]


def test_what_is_measured_is_on_disk_at_once(small, tmp_path):
    probes, seen = callback(output_dir=tmp_path / "out", every=1), []
    end = probes.on_step_end

    def look(args, state, control, **more):
        end(args, state, control, **more)
        seen.append(len(list((tmp_path / "out" / "parts").glob("*.parquet"))))

    probes.on_step_end = look
    trained(small, tmp_path, probes, max_steps=2)
    assert seen == [2, 3] and not (tmp_path / "out" / "parts").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_callback as here
from lddyn.engine import models

class Killed(here.ProbeCallback):
    def on_step_end(self, args, state, control, **more):
        super().on_step_end(args, state, control, **more)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

probes = here.callback().probe_set
here.trained(models.read(sys.argv[2]), sys.argv[3], Killed(probes, every=2, output_dir=sys.argv[3]))
"""


def test_what_was_measured_before_a_crash_is_read_with_one_call(small, model_folder, tmp_path):
    words = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(model_folder("llama")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(store.ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = read(tmp_path)
    whole = callback(output_dir=tmp_path / "whole")
    trained(small, tmp_path / "run", whole)
    table = whole.table()
    pd.testing.assert_frame_equal(left, table[table.step < 4])
    pd.testing.assert_frame_equal(read(tmp_path / "whole"), table)


def test_nothing_is_read_where_nothing_was_measured(tmp_path):
    with pytest.raises(store.RecordError, match="unreadable record"):
        read(tmp_path)


def test_what_a_broken_run_left_does_not_mix_with_that_of_the_next(small, tmp_path):
    probes = callback(output_dir=tmp_path / "out", every=1)
    trained(small, tmp_path / "a", probes, max_steps=3)
    (tmp_path / "out" / "parts").mkdir()
    for part in probes.parts[1:]:
        probes._keep(tmp_path / "out", part)
    again, seen = callback(output_dir=tmp_path / "out"), []
    end = again.on_step_end

    def look(args, state, control, **more):
        end(args, state, control, **more)
        seen.append(read(tmp_path / "out").step.unique().tolist())

    again.on_step_end = look
    trained(small, tmp_path / "b", again, max_steps=2)
    assert seen == [[0], [0, 2]]


def test_a_resumed_run_that_breaks_again_leaves_all_that_was_measured(small, tmp_path):
    out, saving = tmp_path / "out", {"save_strategy": "steps", "save_steps": 4}
    trained(small, tmp_path / "run", callback(output_dir=out), **saving)
    probes, seen = callback(output_dir=out), []
    end = probes.on_step_end

    def look(args, state, control, **more):
        end(args, state, control, **more)
        seen.append(read(out).step.unique().tolist())

    probes.on_step_end = look
    trained(small, tmp_path / "run", probes, resume=True, **saving | {"max_steps": 6})
    assert seen == [[0, 2, 4], [0, 2, 4, 6]]


def test_a_disk_that_is_full_ends_the_probes_and_not_the_training(small, tmp_path, monkeypatch):
    def full(*_):
        raise store.RecordError("cannot write: No space left on device")

    monkeypatch.setattr(store, "write_atomically", full)
    with pytest.warns(Caution, match="since start: cannot write: No space left"):
        trainer = trained(small, tmp_path, callback(output_dir=tmp_path / "out"))
    assert trainer.state.global_step == 4


def test_a_processor_gives_its_tokenizer(small, tmp_path):
    probes = callback()
    probes.on_train_begin(
        None, TrainerState(), None, model=small[0], processing_class=types.SimpleNamespace(tokenizer=small[1])
    )
    assert len(probes.table()) and probes.stopped is None


def test_a_classifier_is_told_apart_and_goes_on_training(small, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(small[1]), num_labels=1, pad_token_id=1, **shape)
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, max_steps=1)
    probes, rows = callback(), datasets.Dataset.from_list(PAIRS)
    trainer = RewardTrainer(
        model=LlamaForSequenceClassification(config), args=args, train_dataset=rows, processing_class=small[1],
        callbacks=[probes],
    )  # fmt: skip
    with pytest.warns(Caution, match="LlamaForSequenceClassification has no output layer"):
        trainer.train()
    assert trainer.state.global_step == 1 and probes.table().empty


def test_examples_follow_accumulation_and_the_batch_in_use(small, tmp_path):
    probes = callback(every=1)
    trained(small, tmp_path, probes, max_steps=2, gradient_accumulation_steps=2)
    steps = probes.table()[["step", "examples"]].drop_duplicates().to_numpy()
    np.testing.assert_array_equal(steps, [[0, 0], [1, 4], [2, 8]])


def test_probes_that_cannot_be_encoded_are_refused_before_the_first_step(small, tmp_path):
    with pytest.raises(InputError, match="max_prompt=1"):
        trained(small, tmp_path, callback(max_prompt=1))


def test_a_table_is_there_before_anything_is_measured():
    assert callback().table().columns.tolist() == store.COLUMNS and isinstance(callback().table(), pd.DataFrame)


class Processes:
    """Two processes that measure at the same time, of which this one is the second; the first one's words are given."""

    def __init__(self, monkeypatch, first):
        self.first, self.second = first, None
        for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self.gather)

    def gather(self, parts, own):
        self.second = own
        parts[:] = [self.first, own]


def test_processes_share_the_prompts_and_all_get_all_rows_in_order(small, monkeypatch):
    model, tokenizer = small
    probes = callback()
    probes.encoded = probes.probe_set.encode(tokenizer)
    whole = probes._divided(model)
    first = whole[whole.prompt_id.isin(["00000", "00002"])]
    two = Processes(monkeypatch, first)
    shared = probes._divided(model)
    assert set(two.second.prompt_id) == {"00001"}, "each measures its own prompts only"
    names = ["prompt_id", "response_type", "metric"]
    assert shared[names].equals(whole[names])
    assert np.allclose(shared.value, whole.value, atol=1e-4)


def test_what_fails_in_one_process_is_told_in_all_and_none_waits(small, monkeypatch):
    model, tokenizer = small
    probes = callback()
    probes.encoded = probes.probe_set.encode(tokenizer)
    Processes(monkeypatch, InputError("no memory over there"))
    with pytest.raises(InputError, match="no memory over there"):
        probes._divided(model)
