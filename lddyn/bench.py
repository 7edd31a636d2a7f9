"""How fast the probing engine is, beside two other ways of computing the same numbers, as ratios within one run.

Three ways to measure twelve responses to each prompt (`WAYS`) take turns on the same random model and token ids. The
ratios and the share of the machine's matrix-product rate are medians over the repeats; memory is the growth of a
fresh process. One thread by default, because other work on the machine then disturbs least.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lddyn import probes, records
from lddyn.logprobs import log1mexp
from lddyn.probes import Encoded

SHAPES = {
    "built-in (128 x 4, V = 2,048)": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048),
    "Pythia-70M (512 x 6, V = 50,304)": dict(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, vocab_size=50304
    ),
}
PROMPTS = {"built-in (128 x 4, V = 2,048)": 24, "Pythia-70M (512 x 6, V = 50,304)": 6}


def random_model(shape: str) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of the named shape with random weights, in evaluation mode."""
    torch.manual_seed(0)
    size = SHAPES[shape]
    config = GPTNeoXConfig(**size, intermediate_size=4 * size["hidden_size"], initializer_range=0.05)
    return GPTNeoXForCausalLM(config).eval()


def random_probes(vocabulary: int, prompts: int) -> Encoded:
    """Prompts of 25 to 64 tokens, each with twelve responses of 25 to 65 tokens."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> list[int]:
        length = torch.randint(low, high + 1, (1,), generator=generator).item()
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    heads = [text(25, 64) for _ in range(prompts)]
    responses = {kind: [text(25, 65) for _ in range(prompts)] for kind in probes.RESPONSE_TYPES}
    return Encoded([f"{i:05d}" for i in range(prompts)], heads, responses)


# --- three ways --------------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(model, encoded: Encoded) -> dict[tuple[int, str], float]:
    """As the authors' evaluation does it: one response type after the other, batches of one (the default of their
    configuration), logits of all positions, full log-softmax, softmax and one-hot copies."""
    sums = {}
    for kind, responses in encoded.responses.items():
        for i, (prompt, response) in enumerate(zip(encoded.prompts, responses, strict=True)):
            ids = torch.tensor([prompt + response])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()[:, :-1]  # (1, tokens, V)
            targets = ids[:, 1:]
            wanted = torch.arange(targets.shape[1]) >= len(prompt) - 1
            logps, p = logits.log_softmax(-1), logits.softmax(-1)
            logp = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            best = logps.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
            one_hot = torch.nn.functional.one_hot(targets, logits.shape[-1])
            measured = [logp, best, (1 - best.exp()).log(), p.norm(dim=-1), (p - one_hot).norm(dim=-1)]
            sums[i, kind] = [(quantity * wanted).sum().item() for quantity in measured][0]
    return sums


@torch.no_grad()
def batched(model, encoded: Encoded, batch_size: int = 32) -> dict[tuple[int, str], float]:
    """As one would write it with transformers: padded batches of similar length, log-softmax of all positions."""
    texts = [(i, kind, encoded.prompts[i], r) for kind, each in encoded.responses.items() for i, r in enumerate(each)]
    texts.sort(key=lambda text: len(text[2]) + len(text[3]))
    sums = {}
    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        ids, mask = probes._padded([prompt + response for *_, prompt, response in rows], "cpu")
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)  # (rows, tokens, V)
        p, targets = logps.exp(), ids[:, 1:].unsqueeze(-1)
        places = torch.arange(ids.shape[1] - 1)
        starts = torch.tensor([len(prompt) - 1 for *_, prompt, _ in rows]).unsqueeze(1)
        wanted = (places >= starts) & (places < mask.sum(1, keepdim=True) - 1)
        logp, best = logps.gather(-1, targets), logps.amax(-1)
        sq_norm = p.square().sum(-1)
        measured = [logp.squeeze(-1), best, log1mexp(best), -(p * logps).sum(-1), sq_norm]
        measured += [(sq_norm - 2 * logp.exp().squeeze(-1) + 1).sqrt(), (logps > logp).sum(-1)]
        values = [torch.where(wanted, quantity, 0).sum(1) for quantity in measured][0]
        sums |= {(i, kind): value for (i, kind, *_), value in zip(rows, values.tolist(), strict=True)}
    return sums


def shared(model, encoded: Encoded) -> dict[tuple[int, str], float]:
    """`probes.measure`: each prompt once, the output layer on response positions only."""
    table = probes.measure(model, encoded)
    logp = table[table.metric == "logp_sum"]
    return {
        (int(i), kind): value for i, kind, value in zip(logp.prompt_id, logp.response_type, logp.value, strict=True)
    }


WAYS = {"the authors' way": one_by_one, "plain batches": batched, "shared prompts": shared}
