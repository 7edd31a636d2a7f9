import json
import os
from itertools import islice

import pandas as pd
import pytest
import torch

from lddyn import InputError
from lddyn.engine import models, probes, store, training
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import ProbeSet
from lddyn.theory import losses

LENGTHS = {"max_prompt": 24, "max_response": 24}
PAIRS = [
    ("Question: what is a list?\nAnswer:", "A list holds things in order.", "A list is a kind of number."),
    ("Question: what is a dict?\nAnswer:", "A dict maps keys to values.", "A dict sorts its values."),
    ("Question: what is a set?\nAnswer:", "A set holds each thing once.", "A set keeps the order of things."),
    ("Question: what is a tuple?\nAnswer:", "A tuple is a list that never changes.", "A tuple grows when it is used."),
] * 3
PROMPTS, CHOSEN, REJECTED = map(list, zip(*PAIRS, strict=True))
SETTINGS = {"seed": 0, "lr": 1e-2, "epochs": 2, "batch_size": 2}


@pytest.fixture
def tiny(model_folder):
    return models.load(str(model_folder("gpt_neox")))


@pytest.fixture
def probe_set():
    return ProbeSet(PROMPTS[:3], {"chosen": CHOSEN[:3], "rejected": REJECTED[:3]})


def rows(tokenizer):
    return training.sft_rows(tokenizer, PROMPTS, CHOSEN, **LENGTHS)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def nothing(probe_set):
    return ProbeCallback(probe_set, at=[], **LENGTHS)


def test_probing_leaves_training_bit_identical(tiny, model_folder, probe_set, tmp_path):
    model, tokenizer = tiny
    often = ProbeCallback(probe_set, every=1, **LENGTHS)
    training.train(tmp_path / "a", model, tokenizer, rows(tokenizer), often, training.Training(**SETTINGS))
    other, _ = models.load(str(model_folder("gpt_neox")))
    training.train(tmp_path / "b", other, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**SETTINGS))
    assert torch.equal(weights(model), weights(other))
    assert sorted(often.table().step.unique()) == list(range(13))


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("architecture", "lora"), [("gpt_neox", 0), ("llama", 0), ("llama", 2)])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_killed_training_resumes_to_the_same_end(model_folder, probe_set, tmp_path, architecture, lora, method):
    """transformers' resume leaves out GPT-NeoX's output layer; the model here has one of its own (not tied)."""

    def run(work, kill_at=None):
        model, tokenizer = models.load(str(model_folder(architecture)))
        reference = models.snapshot(model)
        if lora:
            model = training.with_adapters(model, lora, seed=0)
        callback = ProbeCallback(probe_set, every=4, thresholds=None, **LENGTHS)
        if kill_at:
            step_end = callback.on_step_end

            def killed(args, state, control, **kwargs):
                if state.global_step == kill_at:
                    raise Killed
                return step_end(args, state, control, **kwargs)

            callback.on_step_end = killed
        data = (
            rows(tokenizer) if method == "sft" else training.dpo_rows(tokenizer, PROMPTS, CHOSEN, REJECTED, **LENGTHS)
        )
        how = SETTINGS | {"method": method, "loss": "sequence_sum" if method == "sft" else "sigmoid", "epochs": 4}
        log = training.train(
            work, model, tokenizer, data, callback, training.Training(checkpoints=3, **how), reference=reference
        )
        return model, pd.concat([callback.table(), training.log_rows(log, batch_size=2)])

    with pytest.raises(Killed):
        run(tmp_path / "a", kill_at=17)
    assert list((tmp_path / "a").glob("checkpoint-*/probes.parquet"))
    resumed, table = run(tmp_path / "a")
    whole, expected = run(tmp_path / "b")
    assert torch.equal(weights(resumed), weights(whole))
    pd.testing.assert_frame_equal(table.astype(str), expected.astype(str))


def test_half_written_checkpoint_is_not_resumed_from(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "probes.parquet").touch()
    (tmp_path / "checkpoint-8").mkdir()
    assert training._last_checkpoint(tmp_path).endswith("checkpoint-4")


def test_reference_of_dpo_is_the_model_as_it_comes_in_and_stays(tiny, probe_set, tmp_path):
    model, tokenizer = tiny
    training.train(
        tmp_path / "sft", model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**SETTINGS)
    )
    data = training.dpo_rows(tokenizer, PROMPTS, CHOSEN, REJECTED, **LENGTHS)
    settings = SETTINGS | {"epochs": 1, "batch_size": 12, "method": "dpo", "loss": "sigmoid"}
    log = training.train(tmp_path / "dpo", model, tokenizer, data, nothing(probe_set), training.Training(**settings))
    first = next(entry for entry in log if "train_loss" in entry)
    assert first["train_loss"] == pytest.approx(0.6931, abs=1e-3), "at the first step policy and reference are equal"


def pair_trained(tiny, folder, probe_set, reference=None, **settings):
    """Weights after three steps on pairs, and the trainer's log; `tiny` itself stays as it is."""
    model, tokenizer = tiny
    fresh = models.snapshot(model).requires_grad_(True)
    data = training.dpo_rows(tokenizer, PROMPTS, CHOSEN, REJECTED, **LENGTHS)
    settings = SETTINGS | {"epochs": 1, "batch_size": 4, "method": "dpo", "optimizer": "sgd"} | settings
    how = training.Training(**settings)
    log = training.train(folder, fresh, tokenizer, data, nothing(probe_set), how, reference)
    return weights(fresh), log


@pytest.mark.parametrize(
    "name, options",
    [("dpo", {}), ("hinge", {}), ("kto", {"kl": 0.0}), ("sppo", {})],
)
def test_own_losses_go_through_the_same_trainer_as_those_of_trl(tiny, probe_set, tmp_path, monkeypatch, name, options):
    """Sums over the same tokens, the same reference, the same order of the pairs: only the function differs."""
    monkeypatch.setitem(losses.LOSSES, "ours", losses.LOSSES[name]._replace(trl=None))
    expected, log = pair_trained(tiny, tmp_path / "trl", probe_set, loss=name, beta=0.3)
    found, own_log = pair_trained(tiny, tmp_path / "ours", probe_set, loss="ours", beta=0.3, options=options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, weights(tiny[0]), atol=1e-4)
    assert training.log_rows(log, 4).metric.tolist() == training.log_rows(own_log, 4).metric.tolist()


def test_a_loss_of_trl_goes_by_its_own_name_and_by_that_of_its_function(tiny, probe_set, tmp_path):
    for name, loss in losses.LOSSES.items():
        training.check_loss("dpo", name)
        training.check_loss("dpo", loss.trl or name)
    for ours, trl in (("dpo", "sigmoid"), ("rpo", "sigmoid+sft")):
        found, expected = (pair_trained(tiny, tmp_path / name, probe_set, loss=name)[0] for name in (ours, trl))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", [n for n, loss in losses.LOSSES.items() if loss.trl != "sigmoid"] + ["sigmoid+sft"])
def test_every_loss_trains_and_differs_from_dpo(tiny, probe_set, tmp_path, loss):
    options = {"robust": {"label_smoothing": 0.2}, "sigmoid+sft": {"loss_weights": [1.0, 0.5]}}.get(loss, {})
    found, log = pair_trained(tiny, tmp_path / "a", probe_set, loss=loss, options=options)
    dpo, _ = pair_trained(tiny, tmp_path / "b", probe_set, loss="sigmoid")
    assert torch.isfinite(found).all() and not torch.allclose(found, dpo, atol=1e-6)
    assert any("rewards/margins" in entry for entry in log)


def test_reference_that_is_given_takes_the_place_of_the_model_itself(tiny, model_folder, probe_set, tmp_path):
    other = models.snapshot(tiny[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    for name, settings in (("trl", {"loss": "sigmoid"}), ("own", {"loss": "dpop", "options": {"lam": 0.0}})):
        own, _ = pair_trained(tiny, tmp_path / f"{name}-a", probe_set, **settings)
        given, _ = pair_trained(tiny, tmp_path / f"{name}-b", probe_set, other, **settings)
        same, _ = pair_trained(tiny, tmp_path / f"{name}-c", probe_set, models.snapshot(tiny[0]), **settings)
        assert torch.equal(own, same) and not torch.allclose(own, given, atol=1e-6)


def test_snapshot_after_a_trainer_does_not_follow_the_live_model(tiny, probe_set, tmp_path):
    model, tokenizer = tiny
    training.train(tmp_path / "a", model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**SETTINGS))
    frozen, ids = models.snapshot(model), torch.tensor([[5, 6, 7]])
    before = frozen(ids).logits.clone()
    training.train(tmp_path / "b", model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**SETTINGS))
    assert torch.equal(frozen(ids).logits, before) and not torch.allclose(model(ids).logits, before)


def test_sequence_sum_is_the_summed_logp_that_the_probes_see(tiny, tmp_path):
    model, tokenizer = tiny
    probe = ProbeSet(PROMPTS[:4], {"chosen": CHOSEN[:4]})
    table = probes.measure(model, probe.encode(tokenizer, **LENGTHS)).set_index(["metric"]).value
    data = training.sft_rows(tokenizer, PROMPTS[:4], CHOSEN[:4], **LENGTHS)
    settings = SETTINGS | {"epochs": 1, "batch_size": 4}
    for loss, expected in (
        ("sequence_sum", -table["logp_sum"].mean()),
        ("token_mean", -table["logp_sum"].sum() / table["tokens"].sum()),
    ):
        fresh = models.snapshot(model).requires_grad_(True)
        log = training.train(
            tmp_path / loss, fresh, tokenizer, data, nothing(probe), training.Training(loss=loss, **settings)
        )
        assert log[-1]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_output_layer_is_spent_on_tokens_of_responses_only(tiny, probe_set, tmp_path, monkeypatch):
    model, tokenizer = tiny
    of_sft, of_dpo, settings = [], [], SETTINGS | {"epochs": 1, "batch_size": len(PROMPTS)}
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, hidden, logits: of_sft.append(len(logits)) if torch.is_grad_enabled() else None
    )
    training.train(
        tmp_path / "sft", model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**settings)
    )
    hook.remove()
    assert of_sft == [sum(len([i for i in row if i != -100]) for row in rows(tokenizer)["labels"])]
    kernel = training.trl_utils._ChunkedLogProbFunction

    class Recorder:
        @staticmethod
        def apply(hidden, *rest):
            of_dpo.append(len(hidden))
            return kernel.apply(hidden, *rest)

    monkeypatch.setattr(training.trl_utils, "_ChunkedLogProbFunction", Recorder)
    pairs = training.dpo_rows(tokenizer, PROMPTS, CHOSEN, REJECTED, **LENGTHS)
    training.train(
        tmp_path / "dpo",
        model,
        tokenizer,
        pairs,
        nothing(probe_set),
        training.Training(method="dpo", loss="sigmoid", **settings),
    )
    answers = sum(map(len, [*pairs["chosen_ids"], *pairs["rejected_ids"]]))
    assert of_dpo == [answers, answers]  # policy and reference


def test_first_step_moves_the_model_also_under_warmup(tiny, probe_set, tmp_path):
    model, tokenizer = tiny
    callback = ProbeCallback(probe_set, at=[1], **LENGTHS)
    training.train(tmp_path, model, tokenizer, rows(tokenizer), callback, training.Training(warmup=5, **SETTINGS))
    mean = callback.table().query("metric == 'logp_sum'").groupby("step").value.mean()
    assert mean[1] != mean[0]


def test_weights_stay_float32_unless_bf16_is_asked_for(tiny, probe_set, tmp_path):
    model, tokenizer = tiny
    training.train(tmp_path, model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**SETTINGS))
    arguments = torch.load(next(tmp_path.glob("checkpoint-*")) / "training_args.bin", weights_only=False)
    assert not arguments.bf16 and not arguments.fp16 and next(model.parameters()).dtype == torch.float32


def test_every_trained_response_ends_with_the_end_of_text_and_keeps_its_start(tiny):
    _, tokenizer = tiny
    for row in training.sft_rows(tokenizer, PROMPTS, CHOSEN, max_prompt=24, max_response=100):
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
    long = training.sft_rows(tokenizer, [PROMPTS[0] * 20], [CHOSEN[0] * 20], **LENGTHS)[0]
    assert sum(label != -100 for label in long["labels"]) == LENGTHS["max_response"]
    assert len(long["input_ids"]) == LENGTHS["max_prompt"] + LENGTHS["max_response"]


def test_same_seed_gives_the_same_weights_and_another_seed_others(model_folder, probe_set, tmp_path):
    found = []
    for n, seed in enumerate((3, 3, 4)):
        model, tokenizer = models.load(str(model_folder("gpt_neox")))
        settings = SETTINGS | {"seed": seed}
        training.train(
            tmp_path / str(n), model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**settings)
        )
        found.append(weights(model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_unknown_names_are_one_line(tiny, probe_set, tmp_path):
    model, tokenizer = tiny
    for wrong, message in (({"optimizer": "adam"}, "did you mean 'adamw'"), ({"loss": "sum"}, "unknown loss 'sum'")):
        with pytest.raises(InputError, match=message):
            training.train(
                tmp_path, model, tokenizer, rows(tokenizer), nothing(probe_set), training.Training(**SETTINGS | wrong)
            )
    for wrong, message in (
        ({"loss": "sigmoid+nll"}, "unknown loss 'nll'"),
        ({"loss": "gate"}, "did you mean 'gated'"),
        ({"loss": "dpop", "options": {"lambda": 1.0}}, "unknown option of the loss dpop 'lambda'"),
    ):
        with pytest.raises(InputError, match=message):
            pair_trained(tiny, tmp_path, probe_set, **wrong)


def test_callback_in_somebody_elses_trainers_writes_a_record(tiny, tmp_path):
    """The three lines of the README, in TRL's SFTTrainer and DPOTrainer and in transformers' Trainer."""
    import datasets
    from transformers import Trainer, TrainingArguments
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    model, tokenizer = tiny
    jsonl = tmp_path / "my_prompts.jsonl"
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in islice(PAIRS, 3)]
    jsonl.write_text("\n".join(lines))
    plain = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    plain |= {"save_strategy": "no", "bf16": False}
    prompts = datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    texts = datasets.Dataset.from_dict({"text": [p + " " + c for p, c in zip(PROMPTS, CHOSEN, strict=True)]})
    ids = [tokenizer(t, truncation=True, max_length=8).input_ids[:8] for t in texts["text"]]
    tokenised = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    builders = {
        "dpo": lambda callback, out: DPOTrainer(
            model=model, ref_model=models.snapshot(model), args=DPOConfig(output_dir=out, **plain),
            train_dataset=prompts, processing_class=tokenizer, callbacks=[callback]),
        "sft": lambda callback, out: SFTTrainer(
            model=model, args=SFTConfig(output_dir=out, **plain), train_dataset=texts,
            processing_class=tokenizer, callbacks=[callback]),
        "transformers": lambda callback, out: Trainer(
            model=model, args=TrainingArguments(output_dir=out, **plain), train_dataset=tokenised,
            processing_class=tokenizer, callbacks=[callback]),
    }  # fmt: skip
    for name, build in builders.items():
        callback = ProbeCallback(ProbeSet.from_jsonl(jsonl), every=2, output_dir=tmp_path / name)
        build(callback, str(tmp_path / "out")).train()
        run = store.load(tmp_path / name)
        assert sorted(run.table.step.unique()) == [0, 2, 3]
        assert set(run.table.response_type) == {"chosen", "rejected"}
        assert run.manifest["parameters"]["steps"] == 3


def test_callback_without_a_tokenizer_is_one_line(tiny, probe_set, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, _ = tiny
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    with pytest.raises(InputError, match="needs the trainer's tokenizer"):
        Trainer(model, arguments, train_dataset=data, callbacks=[ProbeCallback(probe_set)]).train()


def test_no_hub_is_asked_when_trainers_are_built():
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
