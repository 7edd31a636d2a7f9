"""SFT and DPO with TRL, looked at with probes while they run. The only module that imports TRL."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from lddyn import InputError, unknown
from lddyn.engine import models, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Model, ProbeSet, Tokenizer
from lddyn.engine.probes import head_sees, padded, probing, unwrapped
from lddyn.engine.progress import Progress
from lddyn.theory import losses

OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop", "sgd": "sgd"}  # transformers' names; RMSprop: the authors'

warnings.filterwarnings("ignore", ".(is_)?gradient_checkpointing", FutureWarning)  # what trl and peft still call

LOGGED = 10  # steps between two rows of the trainer's own numbers


# --- the trainers ------------------------------------------------------------------------------------------


class _Ours(Trainer):  # type: ignore[misc]  # here and below: mypy follows neither transformers nor TRL
    """What our trainers do in their own way: the learning rate, and how they resume."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """A linear rise that already moves at the first step, then constant."""
        warmup = self.args.warmup_steps
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Model | None = None) -> None:
        """transformers leaves out GPT-NeoX's output layer, whose name in files differs from that in memory."""
        if hasattr(self.model, "peft_config") or self.is_fsdp_enabled:  # adapters alone, or weights as in memory
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = AutoModelForCausalLM.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        (model or self.model).load_state_dict(saved.state_dict())


def _lean_head(vocabulary: int) -> None:
    """TRL's output layer for pairs: on answers only also without a GPU, in a buffer no wider than the vocabulary.

    On CPU it would score prompts and padding too, which makes a step of DPO on the built-in model half as slow again.
    """
    trl_utils._use_triton = lambda device: True  # there it only says whether to leave those places out
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(2**15, vocabulary)


class SequenceSumSFT(_Ours, SFTTrainer):  # type: ignore[misc]
    """The authors' SFT loss (section 3.1, eq. 4): minus the summed log pi of a response, mean over the batch.

    TRL's own loss divides by the number of tokens in the batch; at the same learning rate that is another experiment.
    """

    loss_is_scaled_for_ga = False  # the mean over responses leaves gradient accumulation to the trainer

    def compute_loss(
        self, model: Model, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        labels = inputs["labels"]  # (batch, tokens), -100 in the prompt
        predicts = pad(labels[:, 1:] != -100, (0, 1))  # where the next token is one of the response
        with head_sees(self.model, predicts):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        targets = labels[labels != -100]  # (tokens of all responses,)
        loss = cross_entropy(outputs.logits.float(), targets, reduction="sum") / len(labels)
        return (loss, outputs) if return_outputs else loss


class TokenMeanSFT(_Ours, SFTTrainer):  # type: ignore[misc]
    """TRL's SFT loss: minus the mean log pi of a token."""


class TokenisedDPO(_Ours, DPOTrainer):  # type: ignore[misc]
    """DPO on pairs that are token ids already, cut exactly as the probes are."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any, **__: Any) -> datasets.Dataset:
        return dataset


class PairLoss(TokenisedDPO):
    """A loss on pairs that TRL lacks: a function of the summed log-probabilities of both answers (`losses.LOSSES`).

    `pair_loss` and `options`, its keywords, are set after construction.
    """

    pair_loss: Callable[..., Tensor]
    options: Mapping[str, object]

    def compute_loss(
        self, model: Model, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        answers = inputs["completion_mask"]  # (chosen then rejected, tokens)
        labels = inputs["input_ids"].masked_fill(answers == 0, -100)
        text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        chosen, rejected = model(**text, use_cache=False, fused_lm_head=True).log_probs.sum(1).chunk(2)  # (batch,) each
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            with torch.no_grad():
                reference = self.ref_model(**text, use_cache=False, fused_lm_head=True).log_probs.sum(1).chunk(2)
        margin = self.beta * losses.margin(chosen.detach(), rejected.detach(), *reference)
        self._metrics["train"]["rewards/margins"].append(margin.mean().item())
        lengths = dict(zip(("chosen_length", "rejected_length"), answers.sum(1).chunk(2), strict=True))
        given = {"beta": self.beta, **lengths, **self.options}
        return losses.value(self.pair_loss, chosen, rejected, *reference, **given).mean()


SFT_LOSSES = {"sequence_sum": SequenceSumSFT, "token_mean": TokenMeanSFT}
TRL_LOSSES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"]
TRL_LOSSES += ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"]


def check_loss(method: str, loss: str) -> None:
    """Raise `InputError` unless `method`, "sft" or "dpo", can train this loss."""
    if method not in ("sft", "dpo"):
        raise unknown("method", method, ["sft", "dpo"])
    if method == "sft" and loss not in SFT_LOSSES:
        raise unknown("loss", loss, SFT_LOSSES)
    if method == "dpo" and loss not in losses.LOSSES:
        for name in loss.split("+"):
            if name not in TRL_LOSSES:
                raise unknown("loss", name, dict.fromkeys([*TRL_LOSSES, *losses.LOSSES]))


def sft_rows(tokenizer: Tokenizer, prompts: list[str], responses: list[str], **lengths: Any) -> datasets.Dataset:
    """Prompts and responses as token ids, the same as the probes see; the loss is on the response only."""
    ids = ProbeSet(prompts, {"chosen": responses}).encode(tokenizer, **lengths)
    pairs = list(zip(ids.prompts, ids.responses["chosen"], strict=True))
    rows = {"input_ids": [p + r for p, r in pairs], "labels": [[-100] * len(p) + r for p, r in pairs]}
    return datasets.Dataset.from_dict(rows)


def dpo_rows(
    tokenizer: Tokenizer, prompts: list[str], chosen: list[str], rejected: list[str], **lengths: Any
) -> datasets.Dataset:
    """Pairs as token ids, the same as the probes see."""
    ids = ProbeSet(prompts, {"chosen": chosen, "rejected": rejected}).encode(tokenizer, **lengths)
    rows = {"prompt_ids": ids.prompts, "chosen_ids": ids.responses["chosen"], "rejected_ids": ids.responses["rejected"]}
    return datasets.Dataset.from_dict(rows)


def with_adapters(model: Model, rank: int, seed: int) -> Model:
    """The model with LoRA adapters of this rank on all linear layers, in float32; they begin as no change at all."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def quiet() -> None:
    """Silence the libraries' progress bars and advice; errors and warnings about our calls still come through."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # what TRL asks before it draws one for the reference


def _last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole: the probes are what is written last."""
    whole = [p.parent for p in work.glob("checkpoint-*/probes.parquet")]
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    `method` is `sft` (loss `sequence_sum` as in the authors' code, or `token_mean` as in TRL) or `dpo`. The losses of
    `dpo` are `losses.LOSSES` and TRL's (`sigmoid` is DPO; names joined by "+" are added, see its `loss_weights`);
    `options` are keywords of the function, or further settings of TRL's DPOConfig. `batch_size` counts the examples of
    one backward pass of one process, of which an update takes `accumulation`. Learning rate constant after `warmup`
    steps of linear rise that already move at the first one.
    """

    seed: int
    lr: float
    epochs: float
    batch_size: int
    method: str = "sft"
    loss: str = "sequence_sum"
    beta: float = 0.1
    options: Mapping[str, object] | None = None
    optimizer: str = "adamw"
    warmup: int = 0
    clip: float = 10.0  # norm that gradients are cut to
    accumulation: int = 1
    bf16: bool = False
    checkpoints: int = 4


def train(
    work: Path,
    model: Model,
    tokenizer: Tokenizer,
    rows: datasets.Dataset,
    callback: ProbeCallback,
    how: Training,
    reference: Model | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place with TRL; returns the trainer's log, one dict for each logged step.

    The reference is the model as it comes in, unless one is given. Continues from the last whole checkpoint in `work`.
    Raises `InputError` for names that `how` has and nobody knows.
    """
    if how.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", how.optimizer, OPTIMIZERS)
    check_loss(how.method, how.loss)
    _check_room(model, rows)
    quiet()
    steps = -(-len(rows) // (how.batch_size * how.accumulation)) * how.epochs
    common = {
        "output_dir": str(work),
        "per_device_train_batch_size": how.batch_size,
        "gradient_accumulation_steps": how.accumulation,
        "num_train_epochs": how.epochs,
        "optim": OPTIMIZERS[how.optimizer],
        "weight_decay": 0.0,
        "learning_rate": how.lr,
        "warmup_steps": how.warmup,
        "max_grad_norm": how.clip,
        "max_length": None,  # the rows are cut already
        "bf16": how.bf16,
        "activation_checkpointing": False,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "report_to": "none",
        "logging_steps": LOGGED,
        "save_strategy": "steps",
        # only where the trainer logs: its averages since the last log are in no checkpoint
        "save_steps": LOGGED * math.ceil(steps / how.checkpoints / LOGGED),
        "save_total_limit": 1,
        "seed": how.seed,
        "data_seed": how.seed,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    parts = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": rows,
        "callbacks": [callback, Progress(work, callback)],
    }
    with packed_pairs(model, _extremes(rows)) if how.method == "dpo" else contextlib.nullcontext():
        if how.method == "sft":
            trainer = SFT_LOSSES[how.loss](args=SFTConfig(**common), **parts)
        else:
            _lean_head(model.get_output_embeddings().weight.shape[0])
            # Alone, before the first step, when the model is its own reference: no second one in memory, and each pair
            # once. Processes that train together have a copy: what TRL would read is where the model once came from,
            # and what it computes beforehand lies where the other processes do not look.
            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
            common |= {"beta": how.beta, "precompute_ref_log_probs": alone}
            parts["ref_model"] = models.snapshot(model) if reference is None and not alone else reference
            trainer = _pair_trainer(common, how.loss, dict(how.options or {}), parts)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    if callback.stopped:
        raise store.RecordError(callback.stopped)
    return list(trainer.state.log_history)


def _extremes(rows: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    """The shortest and the longest pair, as token ids of both texts."""
    by_length = sorted(rows, key=lambda row: len(row["prompt_ids"] + row["chosen_ids"]))
    ends = (by_length[0], by_length[-1])
    return [(row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) for row in ends]


def _check_room(model: Model, rows: datasets.Dataset) -> None:
    """Raise `InputError` when a row is longer than the model's positions; some would fail in the middle of training."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not room:
        return
    for number, row in enumerate(rows):
        tokens = len(row.get("input_ids") or row["prompt_ids"])
        if "chosen_ids" in row:
            tokens += max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if tokens > room:
            what = f"training row {number} has {tokens} tokens, the model takes {room}"
            raise InputError(f"{what}: lower max_prompt or max_response")


def _pair_trainer(common: dict[str, Any], loss: str, options: dict[str, Any], parts: dict[str, Any]) -> TokenisedDPO:
    """The trainer for one of `losses.LOSSES`, one of TRL's, or a sum of TRL's."""
    found = losses.LOSSES.get(loss)
    of_trl = found.trl if found else loss
    if of_trl or not found:
        return TokenisedDPO(args=DPOConfig(**common, loss_type=(of_trl or loss).split("+"), **options), **parts)
    takes = losses.keywords(found.function)
    for name in options:
        if name not in takes:
            raise unknown(f"option of the loss {loss}", name, takes)
    trainer = PairLoss(args=DPOConfig(**common), **parts)
    trainer.pair_loss, trainer.options = found.function, options
    return trainer


def log_rows(log: list[dict[str, Any]], batch_size: int) -> pd.DataFrame:
    """The trainer's own numbers (loss, gradient norm, and for DPO margin and accuracy) as rows of a long table."""
    names = {"loss": "train_loss", "grad_norm": "grad_norm", "rewards/margins": "train_margin"}
    return store.long(
        (entry["step"], entry["step"] * batch_size, "batch", "all", names[key], float(entry[key]))
        for entry in log
        for key in names
        if key in entry
    )


# --- pairs: what two texts of a batch begin with is computed once, as in probing; the gradients stay equal -----------
#
# A batch of pairs has the texts with the chosen answers first, then those with the rejected ones, so that text i and
# text i + pairs share their prompt. Each pair becomes one row, `prompt chosen rejected`, in which an answer sees its
# prompt and itself.


class Packed(NamedTuple):
    """Pairs of texts as one row each, and where the tokens of the texts are in them."""

    ids: Tensor  # (pairs, L)
    positions: Tensor  # (pairs, L)
    sees: Tensor  # (pairs, L, L): whether a token (second dimension) sees another
    place: Tensor  # (2 pairs, tokens): where in its pair's row a token of a text is; 0 for padding


def pack(ids: Tensor, mask: Tensor) -> Packed:
    """ids, mask: (2 pairs, tokens), padded on the right."""
    (a, b), (in_a, in_b) = ids.chunk(2), mask.bool().chunk(2)  # (pairs, tokens) each
    shared = ((a == b) & in_a & in_b).cumprod(1).sum(1, keepdim=True)  # (pairs, 1): tokens that both begin with
    length_a, length_b = in_a.sum(1, keepdim=True), in_b.sum(1, keepdim=True)
    width = int((length_a + length_b - shared).max())
    at = torch.arange(ids.shape[1], device=ids.device).expand_as(a)  # (pairs, tokens)
    place_a = torch.where(in_a, at, 0)
    place_b = torch.where(in_b, torch.where(at < shared, at, length_a + at - shared), 0)
    row = torch.arange(width, device=ids.device).expand(len(a), width)  # (pairs, L)
    of_b = row >= length_a  # the rest of the second text
    positions = torch.where(of_b, row - length_a + shared, row)
    packed = torch.zeros_like(row)
    for text, inside, place in ((a, in_a, place_a), (b, in_b, place_b)):
        packed.scatter_(1, place, torch.where(inside, text, a[:, :1]))  # padding writes what is at 0 anyway
    query, key = row.unsqueeze(2), row.unsqueeze(1)  # (pairs, L, 1), (pairs, 1, L)
    sees = (key <= query) & ((key < shared.unsqueeze(2)) | (of_b.unsqueeze(1) == of_b.unsqueeze(2)))
    return Packed(packed, positions, sees, torch.cat([place_a, place_b]))


@contextlib.contextmanager
def packed_pairs(model: Model, texts: Sequence[tuple[list[int], list[int]]]) -> Iterator[None]:
    """Within it, the body of the model computes what pairs of texts begin with once, where that saves anything.

    `texts`: token ids of some pairs, on which it is tried first. Nothing changes for a model that gives other hidden
    states in this way, such as one with a sliding window that is shorter than they are.
    """
    body = unwrapped(getattr(model, "module", model)).base_model
    plain, own = body.forward, vars(body).get("forward")
    if not _same_states(body, texts):
        yield
        return

    def forward(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any) -> Any:
        asked = {name for name, value in more.items() if value is not None and value is not False} - {"return_dict"}
        if input_ids is not None and attention_mask is not None and not asked and len(input_ids) % 2 == 0:
            packed = pack(input_ids, attention_mask)
            if packed.ids.numel() < input_ids.numel():
                return _apart(body, plain, packed)
        return plain(input_ids=input_ids, attention_mask=attention_mask, **more)

    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def _apart(body: Model, forward: Callable[..., Any], packed: Packed) -> Any:
    """The body's output for packed pairs; its last hidden states are those of the texts, (2 pairs, tokens, width)."""
    sees = packed.sees.unsqueeze(1)  # (pairs, 1, L, L)
    if body.config._attn_implementation != "sdpa":  # what it adds to the scores
        sees = torch.zeros(sees.shape, dtype=body.dtype, device=sees.device).masked_fill(~sees, -1e9)
    row = {"input_ids": packed.ids, "position_ids": packed.positions, "attention_mask": sees}
    out = forward(**row, use_cache=False)
    states = out.last_hidden_state  # (pairs, L, width)
    pairs = torch.arange(len(states), device=states.device).repeat(2).unsqueeze(1)  # (2 pairs, 1)
    out.last_hidden_state = states[pairs, packed.place]
    return out


def _same_states(body: Model, texts: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Whether hidden states come out the same, of the texts one by one and of them packed."""
    device = next(body.parameters()).device
    ids, mask = padded([text for both in zip(*texts, strict=True) for text in both], device)
    real = mask.bool()
    try:
        with probing(body):
            apart = _apart(body, body.forward, pack(ids, mask)).last_hidden_state[real]
            whole = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[real]
    except Exception:  # whatever a model that was not written for this raises
        return False
    tolerance = 1e-4 if whole.dtype == torch.float32 else 0.05
    return bool((apart - whole).abs().max() <= tolerance * whole.abs().max())
