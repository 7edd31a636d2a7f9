"""What the callback says while a training runs: numbers in the trainer's log, alerts once each, and nothing printed."""

import json
import logging
import sys
import types

import datasets
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback, TrainerState
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lddyn import Caution, InputError
from lddyn.data import preferences
from lddyn.engine import alerts, callback, models, recorded, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import ProbeSet

LENGTHS = {"max_prompt": 32, "max_response": 32}
ROLES = ("prompt", "chosen", "rejected")
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:trl", "ignore:.*:UserWarning:torch")


class Heard(TrainerCallback):
    """As a tracker: keeps what it is told."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **_):
        self.rows.append(logs | {"step": state.global_step})


def pairs(split, count):
    rows = preferences.load("builtin", split, count)
    return datasets.Dataset.from_list([{name: row[name] for name in ROLES} for row in rows])


def dpo(folder, lr=1e-2, *callbacks, **options):
    """A trainer that squeezes within eight steps at this rate."""
    model, tokenizer = models.read(models.located("builtin", "tiny"))
    how = {"per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 3, "lr_scheduler_type": "constant"}
    how |= {"use_cpu": True, "report_to": "none", "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    return DPOTrainer(
        model,
        ref_model=models.snapshot(model),
        args=DPOConfig(output_dir=str(folder), learning_rate=lr, **how | options),
        train_dataset=pairs("train", 32),
        eval_dataset=pairs("test", 6),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def watched(trainer, **options):
    """Train with a callback that draws its probes from the trainer; returns the callback."""
    probed = ProbeCallback(trainer, **{"every": 2, "thresholds": None} | LENGTHS | options)
    trainer.add_callback(probed)
    trainer.train()
    return probed


def told(trainer):
    """The rows of the trainer's log that the callback wrote."""
    return [row for row in trainer.state.log_history if "lddyn/change/chosen" in row]


# --- numbers -----------------------------------------------------------------------------------------------


def test_the_trainers_log_and_its_trackers_get_the_numbers_and_its_printer_does_not(tmp_path, capsys):
    heard = Heard()
    trainer = dpo(tmp_path, 1e-3, heard)
    probed = watched(trainer)
    rows, table = told(trainer), probed.table()
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8] and rows[0]["epoch"] == 0
    assert [row for row in heard.rows if "lddyn/change/chosen" in row] == rows
    means = table[table.metric == "logp_sum"].groupby(["step", table.prompt_id.str[:5], "response_type"]).value.mean()
    last = rows[-1]
    assert last["lddyn/logp/test/rejected"] == pytest.approx(means[8, "test/", "rejected"])
    changes = {kind: means[8, "train", kind] - means[0, "train", kind] for kind in means.index.levels[2]}
    assert last["lddyn/change/chosen"] == pytest.approx(changes["chosen"])
    assert last["lddyn/change/margin"] == pytest.approx(changes["chosen"] - changes["rejected"])
    assert last["lddyn/change/unpushed"] == pytest.approx((changes["other_test"] + changes["unrelated"]) / 2)
    assert "lddyn" not in capsys.readouterr().out


def test_trls_own_rows_and_the_weights_are_the_same_with_and_without_it(tmp_path):
    """TRL ends its averages whenever its own `log` is called, and a step that logs may forget to."""
    with_it, without = dpo(tmp_path / "a", 1e-3), dpo(tmp_path / "b", 1e-3)
    watched(with_it, every=1, generate=2)
    without.train()
    for name, weight in with_it.model.state_dict().items():
        assert torch.equal(weight, without.model.state_dict()[name])
    own = [row for row in with_it.state.log_history if "loss" in row]
    assert own == [row for row in without.state.log_history if "loss" in row] and len(own) == 2


def test_without_a_trainer_the_numbers_are_in_its_log_alone(tmp_path):
    heard, rows = Heard(), pairs("train", 3)
    probes = ProbeSet(rows["prompt"], {kind: rows[kind] for kind in ("chosen", "rejected")})
    trainer = dpo(tmp_path, 1e-3, heard, ProbeCallback(probes, every=4, thresholds=None, **LENGTHS))
    trainer.train()
    assert [row["step"] for row in told(trainer)] == [0, 4, 8]
    assert not [row for row in heard.rows if "lddyn/change/chosen" in row]
    assert "lddyn/logp/train/chosen" in told(trainer)[0] and "lddyn/change/unpushed" not in told(trainer)[0]


def test_a_tracker_that_fails_ends_neither_the_training_nor_the_probes(tmp_path):
    class Away(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "lddyn/change/chosen" in logs:
                raise ConnectionError("no route to the tracker")

    with pytest.warns(Caution, match="could not tell what it measured: no route to the tracker"):
        probed = watched(dpo(tmp_path, 1e-3, Away(), max_steps=2))
    assert probed.table().step.unique().tolist() == [0, 2] and probed.stopped is None


def test_a_training_that_is_stopped_is_measured_at_its_end_after_the_trackers_have_finished(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    heard = Heard()
    trainer = dpo(tmp_path, 1e-3, heard, Stop())
    watched(trainer)
    assert [row["step"] for row in told(trainer)] == [0, 2, 3]
    assert [row["step"] for row in heard.rows if "lddyn/change/chosen" in row] == [0, 2]


def test_a_callback_takes_probes_or_a_trainer_as_trl_does(tmp_path):
    trainer = dpo(tmp_path)
    by_place, by_name = ProbeCallback(trainer), ProbeCallback(trainer=trainer)
    assert by_place.probe_set == by_name.probe_set and by_place.trainer is by_name.trainer is trainer
    probes = ProbeSet(["why?"], {"chosen": ["so"]})
    assert ProbeCallback(probes, trainer=trainer).probe_set is probes
    with pytest.raises(InputError, match="needs a ProbeSet, or a trainer"):
        ProbeCallback()
    with pytest.raises(InputError, match="needs a ProbeSet, or a trainer"):
        ProbeCallback("my_prompts.jsonl")


# --- alerts ------------------------------------------------------------------------------------------------


def test_a_run_that_squeezes_raises_each_alert_once_and_goes_on(tmp_path, caplog):
    trainer = dpo(tmp_path)
    with caplog.at_level(logging.INFO, "lddyn"), pytest.warns(Caution) as caught:
        probed = watched(trainer, thresholds=alerts.Thresholds(), output_dir=tmp_path / "out")
    assert trainer.state.global_step == 8 and probed.stopped is None
    assert sorted(alert.name for alert in probed.alerts) == ["chosen falls", "mass moves to y*"]
    lines = list(map(str, probed.alerts))
    assert [str(w.message) for w in caught if w.category is Caution] == lines
    assert [record.args[0] for record in caplog.records if record.name == "lddyn"] == probed.alerts
    logged = [row["step"] for row in trainer.state.log_history if "lddyn/alert" in row]
    assert logged == [alert.step for alert in probed.alerts]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["alerts"] == [alert._asdict() for alert in probed.alerts] and manifest["cautions"] == lines
    (falls,) = (alert for alert in probed.alerts if alert.name == "chosen falls")
    first = next(row for row in told(trainer) if row["lddyn/change/chosen"] <= -10)
    assert falls.step == first["step"] and f"{-first['lddyn/change/chosen']:.1f} nats" in falls.text


def test_a_run_that_does_not_squeeze_raises_none(tmp_path):
    assert watched(dpo(tmp_path, 1e-5), thresholds=alerts.USUAL).alerts == []


def test_sft_raises_none(tmp_path):
    model, tokenizer = models.read(models.located("builtin", "tiny"))
    rows = pairs("train", 32)
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=8, learning_rate=1e-2, per_device_train_batch_size=4, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    probed = ProbeCallback(ProbeSet.from_pairs(rows, pairs("test", 6)), every=2, **LENGTHS)
    targets = datasets.Dataset.from_dict({"prompt": rows["prompt"], "completion": rows["chosen"]})
    SFTTrainer(model, args=args, train_dataset=targets, processing_class=tokenizer, callbacks=[probed]).train()
    assert probed.alerts == [] and probed.table().step.max() == 8


def test_an_alert_that_was_raised_before_a_resumption_is_kept_and_not_repeated(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    limits = alerts.Thresholds(chosen=5.0, peak=1e3)
    with pytest.warns(Caution, match="chosen answers have fallen"):
        before = watched(dpo(tmp_path / "run", **saving | {"max_steps": 6}), thresholds=limits)
    assert [alert.name for alert in before.alerts] == ["chosen falls"]
    trainer = dpo(tmp_path / "run", **saving)
    again = ProbeCallback(trainer, every=2, thresholds=limits, **LENGTHS)
    trainer.add_callback(again)
    trainer.train(resume_from_checkpoint=True)
    assert again.alerts == before.alerts and again.table().step.max() == 8


def test_an_alert_goes_to_trackio_where_it_is_in_use(tmp_path, monkeypatch):
    heard = []
    stand_in = types.SimpleNamespace(
        alert=lambda **given: heard.append(given), AlertLevel=types.SimpleNamespace(WARN="warn")
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    alert, state = alerts.Alert("chosen falls", 4, "by a lot"), TrainerState()
    args = types.SimpleNamespace(report_to=["trackio"])
    for tracked in (args, types.SimpleNamespace(report_to=["wandb"])):
        with pytest.warns(Caution, match="step 4: by a lot"):
            alerts.tell(alert, tracked, state)
    assert heard == [{"title": "chosen falls", "text": "by a lot", "level": "warn"}]
    state.is_world_process_zero = False
    alerts.tell(alert, args, state)
    assert len(heard) == 1, "one process speaks"


def test_greedy_text_that_begins_to_repeat_is_noticed_where_it_is_asked_for(tmp_path, monkeypatch):
    texts = iter(["one two three four five six", "a b c d " * 10, "a b c d " * 12] * 2)
    monkeypatch.setattr(
        callback.probes, "greedy", lambda model, tokenizer, prompts, *_, **__: [fake(next(texts))] * len(prompts)
    )
    with pytest.warns(Caution, match="of the four-word runs of greedy answers are repeated"):
        trainer = dpo(tmp_path, 1e-5, max_steps=4)
        probed = watched(trainer, generate=2, thresholds=alerts.USUAL, output_dir=tmp_path / "out")
    assert [(alert.name, alert.step) for alert in probed.alerts] == [("text repeats", 2)]
    assert told(trainer)[1]["lddyn/repetition"] == pytest.approx(1 - 4 / 37)
    table = store.load(tmp_path / "out").table
    asked = table[table.metric == "rep4"]
    assert asked.groupby("step").size().to_dict() == {0: 2, 2: 2, 4: 2} and set(asked.response_type) == {"greedy"}


def fake(text):
    return callback.probes.Decoded(text, [1], -3.0)


def test_greedy_text_is_what_the_model_says(tmp_path):
    trainer = dpo(tmp_path, 1e-5, max_steps=1)
    probed = watched(trainer, generate=3)
    ids, prompts = probed.probe_set.prompt_ids[:3], probed.probe_set.prompts[:3]
    table = probed.table().query("response_type == 'greedy' and metric == 'logp_sum' and step == 1")
    again = callback.probes.greedy(trainer.model, trainer.processing_class, prompts, 32, max_prompt=32)
    assert table.prompt_id.tolist() == ids
    assert table.value.tolist() == pytest.approx([answer.logp for answer in again], abs=1e-3)


@pytest.mark.parametrize(
    ("chapter", "group", "raised"),
    [("03_sft", "main", []), ("05_dpo", "from_chat", []), ("05_dpo", "after_sft", ["mass moves to y*"])],
)
def test_recorded_runs_on_a_real_model_raise_what_the_page_says(chapter, group, raised):
    """book/other_models.md: DPO after SFT moves mass to y*; SFT, and DPO from the chat model, do not."""
    runs = recorded.read(chapter, group)
    assert len(runs) >= 3
    for run in runs:
        table = run.table[run.table.prompt_id != "batch"]
        parts = [part for _, part in table.groupby("step")]
        names = [a.name for part in parts for a in alerts.raised(alerts.numbers(parts[0], part), 0, alerts.USUAL)]
        assert list(dict.fromkeys(names)) == raised


def test_numbers_of_what_was_not_measured_are_left_out():
    rows = [("test/a", "chosen", "logp_sum", -4.0), ("test/a", "greedy", "rep4", 0.5)]
    now = pd.DataFrame(rows, columns=["prompt_id", "response_type", "metric", "value"])
    assert alerts.numbers(now[:1], now) == {"lddyn/logp/test/chosen": -4.0, "lddyn/change/chosen": 0.0}
    assert alerts.raised(alerts.numbers(now[:1], now), 0, alerts.USUAL) == []
