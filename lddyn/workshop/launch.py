"""`python -m lddyn train`: the chapters' training outside a notebook, alone, under `torchrun` or `accelerate launch`.

Settings come from parameter files in order, then from `--set`; a name or value that is wrong is one line before
anything is loaded. All processes train and measure, the first one writes the record.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lddyn import InputError, unknown
from lddyn.chapters import claims
from lddyn.chapters.dpo import run as dpo
from lddyn.data import preferences
from lddyn.engine import cache, models, pretraining, recipe, store, training
from lddyn.engine.settings import choose, derive, parse_all, read_cell, read_yaml
from lddyn.workshop import estimate, tune

FILES = store.BOOK / "settings"
PARAMETERS = read_cell(
    """
scale: str = "laptop"  # {smoke, laptop, paper} gives every value below that is none
method: str = "sft"  # {sft, dpo}
model: str | None = None  # builtin, a folder or a hub id; untouched, it writes the initial answers
start: str | None = None  # the folder that training starts from, such as runs/.../model of an SFT run; none: the model
size: str | None = None  # of the built-in model: tiny, small, or WIDTHxLAYERS such as 192x6
data: str | None = None  # builtin, a JSON Lines file, hh, ultrafeedback or a hub id
seed: int = 0  # [0, 1000000]
n_train: int | None = None  # [1, 10000000] training prompts
n_probe: int | None = None  # [1, 100000] of them that are probed
n_probe_test: int | None = None  # [0, 100000] probed prompts that are never trained on
epochs: float | None = None  # (0, 1000]
evaluations: int | None = None  # [2, 10000] of all probes, denser at the start
batch_size: int | None = None  # [1, 100000] examples of one update, over all processes
accumulation: int = 1  # [1, 1024] passes that one update is divided into
lr: float | None = None  # (0, 10] learning rate
beta: float | None = None  # (0, 100] of DPO
loss: str | None = None  # sft: sequence_sum or token_mean; dpo: one of lddyn/theory/losses.py, or of TRL's
optimizer: str | None = None  # {adamw, rmsprop, sgd}
warmup: int | None = None  # [0, 100000] updates
clip: float = 10.0  # (0, 1000000] norm that gradients are cut to
max_prompt: int | None = None  # [2, 100000] tokens
max_response: int | None = None  # [1, 100000] tokens
format: str = "auto"  # {auto, chat, plain} dialogues by the tokenizer's template; chat: plain prompts too; plain: none
skip_bad_rows: str = "no"  # {no, rows, fields} what to leave out where a row of the data is bad
probe_tokens: int | None = None  # [64, 1000000] probed at once; fewer need less memory; none: by device
lora: int = 0  # [0, 4096] rank of LoRA adapters; 0 trains all weights
bf16: bool = False  # compute in bfloat16, keep the weights as dtype says
dtype: str = "float32"  # {float32, bfloat16} of the weights
device: str = "cpu"  # cpu or cuda
""",
    "PARAMETERS",
)


@dataclass(frozen=True)
class Launch(tune.Tune):
    """The settings of a training as they are given: `model` may be "builtin", of a `size`."""

    scale: str
    size: str


def file_of(name: str) -> Path:
    """A parameter file, by path or by its name in `book/settings`."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else FILES / f"{name}.yml"
    if not path.is_file():
        raise unknown("settings", name, sorted(p.stem for p in FILES.glob("*.yml")))
    return path


def settings(files: Sequence[str] = (), words: Mapping[str, object] | None = None) -> Launch:
    """Every value of a training: from the files in order, then `words`; what is missing comes from the scale.

    Raises `InputError` for the first name or value that is wrong.
    """
    given = {}
    for name in files:
        path = file_of(name)
        given |= parse_all(PARAMETERS, read_yaml(path), path.name)
    given |= parse_all(PARAMETERS, words or {}, "train")
    chosen = {name: p.default for name, p in PARAMETERS.items()} | given
    if chosen["start"] and not Path(chosen["start"]).is_dir():
        raise InputError(f"there is no model folder {chosen['start']!r} to start from")
    scales = recipe.SCALES if chosen["method"] == "sft" else dpo.SCALES
    common = {"loss": tune.METHODS[chosen["method"]], "beta": 0.1, "start": None, "probe_tokens": None}
    found = choose(Launch, {scale: common | of_scale for scale, of_scale in scales.items()}, chosen["scale"], chosen)
    training.check_loss(found.method, found.loss)
    return found


def base_model(chosen: Launch) -> str:
    """The folder or hub id that `model` and `size` stand for; pre-trains a built-in model if need be.

    A built-in model of another architecture learns from the same texts as `small`, with the same tokenizer, at a
    learning rate that falls with its width.
    """
    if chosen.model != "builtin" or chosen.size in pretraining.SIZES:
        return recipe.base_model(chosen)
    small, shape = pretraining.SIZES["small"], estimate.architecture(chosen.size)
    lr = round(8e-3 * small["architecture"]["width"] / shape["width"], 6)
    return str(pretraining.pretrained(small["libraries"], architecture=shape, steps=small["steps"], seed=0, lr=lr))


def job(chosen: Launch) -> tuple[tune.Tune, dict[str, Path]]:
    """The settings of `tune.tune` and the files that it reads; pre-trains the built-in model if need be."""
    settings = derive(tune.Tune, chosen, model=base_model(chosen))
    files = models.inputs(settings.model) | preferences.inputs(settings.data)
    if settings.start:
        files |= {f"start {name}": path for name, path in models.inputs(settings.start).items()}
    return settings, files


def train(files: Sequence[str], words: Mapping[str, object], force: bool = False) -> store.Run | None:
    """What `python -m lddyn train` does; the run, or None in all processes but the first.

    Raises `InputError` when a setting is wrong or, without `force`, when the machine is too small.
    """
    chosen = settings(files, words)
    world, rank = tune.processes()
    _settle_with_launcher(chosen, world)
    tune.share_of_batch(chosen.batch_size, chosen.accumulation, world)
    expected = estimate.estimate(chosen, world, tune.sharded())
    if rank == 0:
        print(estimate.report(expected), flush=True)
    if not force:
        estimate.refuse_what_does_not_fit(chosen, world, tune.sharded())
    run = cache.run(tune.tune, *job(chosen), threads=None) if world == 1 else _together(chosen, rank)
    for message in run.manifest["cautions"] if run else ():
        print(f"lddyn: caution: {message}", file=sys.stderr)
    return run


def _settle_with_launcher(chosen: Launch, world: int) -> None:
    """Refuse what `accelerate launch` asks for and is not there; the precision is the settings', not the launcher's."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError("DeepSpeed is not supported; use FSDP2 (accelerate launch) or whole copies (torchrun)")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if chosen.bf16 else "no"
    if not tune.sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("FSDP 1 is not supported; write fsdp_version: 2 in the file for accelerate launch")
    if world == 1:
        raise InputError("FSDP2 needs at least two processes; accelerate launch --num_processes says how many")
    if chosen.lora:
        raise InputError("adapters (lora) are not sharded; use torchrun, which keeps whole copies of the model")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process samples from the whole model first


def _together(chosen: Launch, rank: int) -> store.Run | None:
    """One run by several processes. The first one owns the record and tells the others whether there is work."""
    import torch
    from accelerate import DistributedType, PartialState
    from accelerate.utils import broadcast_object_list

    if chosen.device == "cpu":
        torch.set_num_threads(1)
    elif chosen.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    state = PartialState(cpu=chosen.device == "cpu")
    if tune.sharded() and state.distributed_type is DistributedType.MULTI_CPU:
        raise InputError("accelerate shards on GPUs only; use torchrun with device cpu, or --set device cuda")

    def tell(word: str) -> str:
        message = [word]
        broadcast_object_list(message)
        return message[0]

    if rank == 0:
        run = cache.run(_announced(tune.tune, tell), *job(chosen))
        tell("over")
        store.write_json(run.folder / "manifest.json", run.manifest | {"processes": state.num_processes})
    else:
        run = None
        folder = tell("")
        while folder != "over":
            tune.tune(Path(folder), job(chosen)[0])
            folder = tell("")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()  # gloo's threads sometimes abort a process that ends without this
    return run


def _announced(function: Callable, tell: Callable[[str], str]) -> Callable:
    """The same function to `cache`, but it first tells the other processes where it works."""

    @functools.wraps(function)
    def announced(work: Path, settings: tune.Tune):
        tell(str(work))
        return function(work, settings)

    return announced


RATE = 1e14  # FLOP/s of a matrix product on the GPU of the table below
VARIANTS = {  # of the table in the book: heading, settings on top of a model's file
    "as the authors": ((), {}),
    "probing 4,096 tokens at once": ((), {"probe_tokens": 4096}),
    "the same, bf16": (("bf16",), {"probe_tokens": 4096}),
    "the same, LoRA": (("lora",), {"probe_tokens": 4096}),
}


def table(rate: float = RATE) -> str:
    """Memory in GiB, and hours, of the paper's models in each variant, as Markdown."""
    rows, names = [], [p.stem for p in FILES.glob("*.yml") if "model" in read_yaml(p)]
    for name in sorted(names, key=lambda n: estimate.estimate(settings([n]), rate=rate).shape.parameters):
        cells, hours = [], []
        for files, words in VARIANTS.values():
            both = [estimate.estimate(settings([name, *files], words | {"method": m}), rate=rate) for m in tune.METHODS]
            cells.append(" / ".join(f"{e.gib:.0f}" for e in both))
            hours = hours or [f"{e.hours:.0f}" for e in both]
        rows.append((f"`{name}`", f"{both[0].shape.parameters / 1e6:,.0f} M", *cells, " / ".join(hours)))
    heads = ("settings", "parameters", *(f"{name}: SFT / DPO" for name in VARIANTS), "SFT / DPO, hours")
    return claims.markdown_table(heads, rows)
