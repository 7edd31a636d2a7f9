"""Pre-training: how the built-in models are made, from the texts that they learn to their weights in a folder.

A built-in model is a small GPT-NeoX, the architecture of Pythia, with its own byte-level BPE. It has learned English
from the documentation strings of installed libraries and from the pre-training split of the built-in preference set.
Those of seed 0 come with the package; `repeat` makes them again.
"""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lddyn.data import preferences, world
from lddyn.engine import cache, probe_set, prose, store

LOG = logging.getLogger("lddyn")
SIZES: dict[str, dict[str, Any]] = {  # a few seconds; one to two minutes
    "tiny": {
        "architecture": {"width": 48, "layers": 2, "heads": 2, "vocab": 1024},
        "libraries": ["sklearn"],
        "steps": 150,
    },
    "small": {
        "architecture": {"width": 96, "layers": 3, "heads": 4, "vocab": 2048},
        "libraries": list(prose.LIBRARIES),
        "steps": 1400,
    },
    "world": {  # the closed world: no prose
        "architecture": {"width": 96, "layers": 3, "heads": 4, "vocab": 1024},
        "libraries": [],
        "steps": 800,
        "batch_size": 16,
        "block": 64,
    },
}
SHIPPED = store.PACKAGE / "data" / "models"  # SIZE/ with weights, tokenizer and recipe.yml; seed 0
EOS, PAD = "<|endoftext|>", "<|pad|>"


def pretrained(libraries: Sequence[str], **recipe: Any) -> Path:
    """The folder of a model that is pre-trained now or comes from the cache; the manifest beside it names the corpus.

    `recipe`: the parameters of `pretrain`; `libraries` are names of `prose.LIBRARIES` as they are installed.
    """
    run = _pretraining(libraries, recipe)
    if not (run.folder / "model" / "model.safetensors").exists():  # deleted to make room
        shutil.rmtree(run.folder)
        run = _pretraining(libraries, recipe)
    return run.folder / "model"


def _pretraining(libraries: Sequence[str], recipe: Mapping[str, Any]) -> store.Run:
    installed, corpus = prose.versions(libraries), {}  # the closed world is in the code
    if libraries:
        corpus = {"prose": prose.run(installed).folder / "prose.txt", "preferences": preferences.BUILTIN}
    return cache.run(pretrain, {**recipe, "libraries": installed}, corpus)


def repeat(size: str, ship: bool = False) -> tuple[bool, str]:
    """Pre-train the built-in model of a size again: whether it is equal to the one of the package, and a line on it.

    With `ship` it takes the place of the one in the package, with its recipe: corpus, versions, hashes, loss.
    """
    folder = pretrained(seed=0, **SIZES[size])
    run, there = store.load(folder.parent), SHIPPED / size
    loss = run.table[run.table.prompt_id == "held out"].value.iloc[-1]
    made = {
        "parameters": run.manifest["parameters"],
        "corpus": {name: file["sha256"] for name, file in run.manifest["inputs"].items()},
        "versions": run.manifest["versions"],
        "held_out_loss": round(float(loss), 4),  # nats per token
        "sha256": {file.name: store.file_hash(file) for file in sorted(folder.iterdir())},
    }
    if ship:
        shutil.copytree(folder, there, copy_function=shutil.copyfile, dirs_exist_ok=True)
        (there / "recipe.yml").write_text(yaml.safe_dump(made, sort_keys=False))
    recipe = yaml.safe_load((there / "recipe.yml").read_text())
    differ = [name for name in ("corpus", "versions", "sha256") if recipe[name] != made[name]]
    equal = "sha256" not in differ
    line = f"{size}: {'equal to' if equal else 'not'} the model of this package"
    return equal, line + (f" ({', '.join(differ)} differ)" if differ else "")


def pretrain(
    work: Path,
    architecture: Mapping[str, int],
    libraries: Mapping[str, str],
    steps: int,
    seed: int,
    batch_size: int = 8,
    block: int = 128,
    lr: float = 8e-3,
) -> pd.DataFrame:
    """Pre-train a model into `work.parent / "model"`; returns a long table with the loss in nats per token.

    `architecture` has width, layers, heads and vocab. AdamW (betas 0.9 and 0.99, weight decay 0.1), 5% of warm-up and
    a cosine to 0, gradient norm clipped at 1, `batch_size` blocks of `block` tokens a step. The rows are the mean over
    the steps since the row before, and over documents held out. A checkpoint every 100 steps lets an interrupted run
    end with the same weights.
    """
    texts, left_out = documents(libraries, seed)
    tokenizer = _tokenizer(work / "tokenizer", texts, architecture["vocab"])
    train, held_out = blocks(tokenizer, texts, block), blocks(tokenizer, left_out, block)
    order = _order(len(train), steps * batch_size, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _untrained(tokenizer, **architecture)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    start, rows, losses, checkpoint = 0, [], [], work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, rows = saved["step"], saved["rows"]
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = lr * _schedule(step / steps)
        batch = train[order[step * batch_size : (step + 1) * batch_size]]  # (batch, block + 1)
        losses.append(_backward(model, batch))
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 100 == 0 or done == steps:
            for name, loss in [("trained on", float(np.mean(losses))), ("held out", _mean_loss(model, held_out))]:
                rows.append((done, done * batch_size, name, "prose", "loss", loss))
            losses.clear()
            LOG.info("pre-training: step %d of %d, %.2f nats per token", done, steps, rows[-1][-1])
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "rows": rows}
            store.write_atomically(checkpoint, partial(torch.save, states))
    store.write_pretrained(work.parent / "model", model, tokenizer)
    return store.long(rows)


def documents(libraries: Mapping[str, str], seed: int, share: float = 0.08) -> tuple[list[str], list[str]]:
    """Texts to train on, in random order, and to hold out: every fiftieth of the prose.

    The pre-training preferences are repeated until they are `share` of the documents: without them everything that
    is like an answer would rise together when SFT begins. Without libraries, the texts of the closed world.
    """
    if not libraries:
        return world.documents(seed)
    written, examples = prose.documents(libraries), preferences.load("builtin", "pretrain")
    held_out = written[::50]
    written = [text for number, text in enumerate(written) if number % 50]
    repeats = max(1, round(share / (1 - share) * len(written) / len(examples)))
    texts = written + [e["prompt"] + e["chosen"] for e in examples] * repeats
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))], held_out


def blocks(tokenizer: probe_set.Tokenizer, texts: Sequence[str], block: int) -> Tensor:
    """All texts in one row, an end of text after each, cut: (n, block + 1); a block's last token begins the next."""
    ids = [token for encoded in tokenizer(texts).input_ids for token in (*encoded, tokenizer.eos_token_id)]
    return torch.tensor(ids).unfold(0, block + 1, block)


def _tokenizer(folder: Path, texts: Sequence[str], vocab: int) -> probe_set.Tokenizer:
    if not folder.exists():
        bpe = Tokenizer(BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        every_byte = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[EOS, PAD], initial_alphabet=every_byte, show_progress=False
        )
        bpe.train_from_iterator(sorted(texts), trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)
        store.write_pretrained(folder, fast)
    return AutoTokenizer.from_pretrained(folder)


def _untrained(tokenizer: probe_set.Tokenizer, width: int, layers: int, heads: int, vocab: int) -> probe_set.Model:
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,  # with the usual 0.02 a narrow model learns slowly
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPTNeoXForCausalLM(config)


def _order(count: int, draws: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-draws // count))])


def _schedule(progress: float) -> float:
    return min((progress + 1e-3) / 0.05, 0.5 * (1 + math.cos(math.pi * progress)))


def _backward(model: probe_set.Model, batch: Tensor) -> float:
    """Add the gradients of the mean loss. 512 tokens at a time through the output layer, a quarter faster on a CPU."""
    hidden = model.gpt_neox(batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)  # (tokens, width)
    top, total = hidden.detach().requires_grad_(), 0.0
    for part, targets in zip(top.split(512), batch[:, 1:].flatten().split(512), strict=True):
        loss = cross_entropy(model.lm_head(part), targets, reduction="sum") / len(top)
        loss.backward()
        total += loss.item()
    hidden.backward(top.grad)
    return total


@torch.no_grad()
def _mean_loss(model: probe_set.Model, rows: Tensor) -> float:
    total = 0.0
    for part in rows.split(16):
        logits = model(part[:, :-1], use_cache=False).logits  # (batch, block, vocab)
        total += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()
