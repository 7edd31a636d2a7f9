"""How fast the probing engine and first-order predictions are, beside other ways to the same numbers, in one run.

The ways (`WAYS` to measure twelve responses to each prompt, `PREDICTIONS` to predict what one step does to many
responses, those of `compare_influences` for a step on each of many pairs) take turns on the same random model and
tokens. Seconds are CPU seconds of one thread by default, which other work on the machine disturbs least; ratios and
shares are medians over the repeats; memory is what a fresh process gains.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from lddyn import InputError
from lddyn.__main__ import positive
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import cache, pool, probes, reach, store
from lddyn.engine.probe_set import Encoded
from lddyn.publish import pages
from lddyn.theory import first_order, influence, kernels, losses
from lddyn.theory.first_order import Text
from lddyn.theory.influences import influences
from lddyn.theory.logprobs import log1mexp

SHAPES = {  # width, layers, heads, vocabulary, prompts to measure
    "built-in": (128, 4, 4, 2048, 48),
    "Pythia-70M": (512, 6, 8, 50304, 6),
}
FIRST_ORDER = {"0.4M": (96, 3, 4, 256, 0), "6M": (256, 6, 4, 2048, 0)}  # the first is as small as explicit kernels need

STAGES = {
    "memory": 190,
    "twelve responses": 120,
    "lengths of prompts": 20,
    "predictions": 40,
    "influences": 510,
}  # seconds
INFLUENCES = ((8, 16), (16, 48), (64, 192))  # pairs, observed responses


def random_model(shape: str, device: str = "cpu") -> GPTNeoXForCausalLM:
    """A GPT-NeoX with random weights, of one of the sizes in `SHAPES` and `FIRST_ORDER`."""
    width, layers, heads, vocabulary, _ = (SHAPES | FIRST_ORDER)[shape]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        initializer_range=0.05,
    )
    return GPTNeoXForCausalLM(config).eval().to(device)


def random_probes(vocabulary: int, prompts: int, prompt_tokens=(25, 64), response_tokens=(25, 65)) -> Encoded:
    """Prompts of random tokens, each with twelve responses; lengths uniform in the given ranges."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> list[int]:
        length = torch.randint(low, high + 1, (1,), generator=generator).item()
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    heads = [text(*prompt_tokens) for _ in range(prompts)]
    responses = {kind: [text(*response_tokens) for _ in range(prompts)] for kind in RESPONSE_TYPES}
    return Encoded([f"{i:05d}" for i in range(prompts)], heads, responses)


# --- three ways to log pi(y), log pi(y*) and the rest ------------------------------------------------------

Sums = dict[tuple[int, str], list[float]]  # (prompt, response type): [logp_sum, argmax_logp_sum, ...]


@torch.no_grad()
def one_by_one(model, encoded: Encoded) -> Sums:
    """As in the authors' evaluation: one response type after the other in batches of one (the default of their
    configuration), logits of all positions, full log-softmax, softmax and one-hot copies."""
    sums = {}
    for kind, responses in encoded.responses.items():
        for i, (prompt, response) in enumerate(zip(encoded.prompts, responses, strict=True)):
            ids, mask = probes.padded([prompt + response], model.device)
            logits = model(input_ids=ids, attention_mask=mask).logits.float()[:, :-1]  # (1, tokens, V)
            targets = ids[:, 1:]
            wanted = torch.arange(targets.shape[1], device=ids.device) >= len(prompt) - 1
            logps, p = logits.log_softmax(-1), logits.softmax(-1)
            logp = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            best = logps.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
            one_hot = torch.nn.functional.one_hot(targets, logits.shape[-1])
            measured = [logp, best, (1 - best.exp()).log(), p.norm(dim=-1), (p - one_hot).norm(dim=-1)]
            sums[i, kind] = [(quantity * wanted).sum().item() for quantity in measured]
    return sums


@torch.no_grad()
def batched(model, encoded: Encoded, batch_size: int = 32) -> Sums:
    """As one would write it with transformers: padded batches of similar length, log-softmax of all positions."""
    texts = [(i, kind, encoded.prompts[i], r) for kind, each in encoded.responses.items() for i, r in enumerate(each)]
    texts.sort(key=lambda text: len(text[2]) + len(text[3]))
    sums = {}
    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        ids, mask = probes.padded([prompt + response for *_, prompt, response in rows], model.device)
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)  # (rows, tokens, V)
        p, targets = logps.exp(), ids[:, 1:].unsqueeze(-1)
        places = torch.arange(ids.shape[1] - 1, device=ids.device)
        starts = torch.tensor([len(prompt) - 1 for *_, prompt, _ in rows], device=ids.device).unsqueeze(1)
        wanted = (places >= starts) & (places < mask.sum(1, keepdim=True) - 1)
        logp, best, sq_norm = logps.gather(-1, targets), logps.amax(-1), p.square().sum(-1)
        measured = [logp.squeeze(-1), best, log1mexp(best), -(p * logps).sum(-1), sq_norm]
        measured += [(sq_norm - 2 * logp.exp().squeeze(-1) + 1).sqrt(), (logps > logp).sum(-1)]
        values = torch.stack([(quantity * wanted).sum(1) for quantity in measured], 1).tolist()
        sums |= {(i, kind): value for (i, kind, *_), value in zip(rows, values, strict=True)}
    return sums


def shared(model, encoded: Encoded) -> Sums:
    """`probes.measure`: each prompt once, the output layer on response positions only."""
    table = probes.measure(model, encoded).pivot(index=["prompt_id", "response_type"], columns="metric", values="value")
    values = table[["logp_sum", "argmax_logp_sum"]].to_numpy().tolist()
    return {(int(i), kind): value for (i, kind), value in zip(table.index, values, strict=True)}


WAYS = {"the authors' way": one_by_one, "plain batches": batched, "shared prompts": shared}


# --- four ways to what one SFT step does to many responses -------------------------------------------------


def random_texts(vocabulary: int, count: int, tokens: int = 16) -> list[Text]:
    """Prompts and responses of `tokens` random tokens each; the first is the update, the rest are observed."""
    ids = torch.randint(vocabulary, (count + 1, 2, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [(prompt, response) for prompt, response in ids]


def by_one_jvp(model, update: Text, texts: list[Text]) -> Tensor:
    """`first_order.predicted_change`: one backward pass, one Jacobian-vector product."""
    return first_order.predicted_change(model, first_order.step(model, 1.0, [update]), texts).sums


def by_loop(model, update: Text, texts: list[Text]) -> Tensor:
    """A Python loop: the gradient of each response in turn, times the update."""
    step = first_order.step(model, 1.0, [update])
    return torch.tensor([-first_order.inner(first_order.gradient(model, [text]), step) for text in texts])


def by_vmap(model, update: Text, texts: list[Text]) -> Tensor:
    """torch.func's per-example gradients of all responses at once, times the update; responses of one length."""
    step = first_order.step(model, 1.0, [update])
    ids = torch.tensor([[*prompt, *response] for prompt, response in texts], device=model.device)

    def logp(theta: dict, row: Tensor) -> Tensor:
        z = functional_call(model, theta, (), {"input_ids": row[None], "use_cache": False}).logits[0]
        logps = z[:-1].log_softmax(-1).gather(-1, row[1:, None])
        return logps[len(texts[0][0]) - 1 :].sum()

    with first_order.differentiable(model):
        each = vmap(grad(logp), (None, 0))(first_order.trainable(model), ids)
    return sum(torch.einsum("n...,...->n", g, step[name]) for name, g in each.items())


def by_kernel(model, update: Text, texts: list[Text]) -> Tensor:
    """The materialised kernel: torch.func's Jacobians of all logits, K = J_o J_u^T, and -A K G."""
    theta = first_order.trainable(model)

    def jacobian(text: Text) -> Tensor:
        ids = torch.tensor([[*text[0], *text[1]]], device=model.device)

        def logits(theta: dict) -> Tensor:
            z = functional_call(model, theta, (), {"input_ids": ids, "use_cache": False}).logits[0]
            return z[len(text[0]) - 1 : -1].flatten()

        return torch.cat([j.flatten(1) for j in jacrev(logits)(theta).values()], dim=1)  # (tokens V, parameters)

    z = kernels.logits(model, [update, *texts])
    g = kernels.residual(z[0], update[1]).flatten()
    changes = []
    with first_order.differentiable(model):
        of_update = jacobian(update)
        for text, z_o in zip(texts, z[1:], strict=True):
            change = -((jacobian(text) @ of_update.T) @ g).view(z_o.shape)
            change = (influence.normalization(z_o.softmax(-1)) @ change.unsqueeze(-1)).squeeze(-1)
            changes.append(change.gather(-1, torch.tensor(text[1], device=z_o.device)[:, None]).sum())
    return torch.stack(changes)


PREDICTIONS = {"one jvp": by_one_jvp, "loop of gradients": by_loop, "vmap of gradients": by_vmap}
PREDICTIONS["explicit kernel"] = by_kernel


# --- what a step on each of many pairs does to many responses ----------------------------------------------


def tenth_of_smollm2(device: str) -> LlamaForCausalLM:
    """Three of the thirty layers of SmolLM2-135M with random weights, and a tenth of its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4915,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().to(device)


def compare_influences(pairs: int, count: int, repeats: int, device: str) -> list[dict]:
    """Three ways to the influence of DPO pairs on responses, of 32 tokens after 32 of prompt, in turn.

    A product for each pair and response is timed on one pair and four responses, one for each pair and all responses on
    one pair, and both multiplied. One row each: seconds, ratio to `influences`, and the largest difference from it on
    what was timed, as a share of the largest change.
    """
    model, dpo = tenth_of_smollm2(device), losses.dpo_loss
    texts = random_texts(model.config.vocab_size, 2 * pairs + count - 1, 32)
    chosen, others, observed = texts[:pairs], texts[pairs : 2 * pairs], texts[2 * pairs :]
    rejected = [(prompt, response) for (prompt, _), (_, response) in zip(chosen, others, strict=True)]
    singly, at_once = "a product for each pair and response", "a product for each pair"
    spent, off = {singly: [], at_once: [], "influences": []}, {"influences": 0.0}
    influences(model, observed[:1], chosen[:1], rejected[:1], dpo)
    first_order.predicted_change(model, first_order.step(model, 1.0, chosen[:1]), observed[:1])
    for _ in range(repeats):
        time_, found = seconds(lambda: influences(model, observed, chosen, rejected, dpo), device)
        spent["influences"].append(time_)
        gradient, update = seconds(lambda: first_order.step(model, 1.0, chosen[:1], rejected[:1], loss=dpo), device)
        for way, parts in ((singly, [[text] for text in observed[:4]]), (at_once, [observed])):
            time_, changes = seconds(
                lambda u=update, parts=parts: [first_order.predicted_change(model, u, part).sums for part in parts],
                device,
            )
            change = torch.cat(changes)
            spent[way].append(pairs * (gradient + time_ * count / len(change)))
            off[way] = ((change - found[0, : len(change)]).abs().max() / change.abs().max()).item()
    return [
        {
            "pairs": pairs,
            "observations": count,
            "way": way,
            "seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, spent["influences"], strict=True)),
            "difference": off[way],
        }
        for way, times in spent.items()
    ]


# --- clocks and counters -----------------------------------------------------------------------------------


def seconds(function, device: str) -> tuple[float, object]:
    """CPU seconds of this process with one thread, else wall-clock seconds; and what the function returned."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start, result


def matrix_rate(device: str) -> float:
    """Floating-point operations a second in a 1,024 x 1,024 float32 matrix product; the best of ten."""
    a = torch.randn(1024, 1024, device=device)
    return 2 * 1024**3 / min(seconds(lambda: a @ a, device)[0] for _ in range(10))


def unique_operations(shape: str, encoded: Encoded) -> int:
    """Operations that cannot be avoided: matrix products for each distinct position (its weights, its attention to what
    came before) and the output layer for each distinct prediction. A response's last token is only predicted."""
    width, layers, _, vocabulary, _ = SHAPES[shape]
    positions = context = predictions = 0
    for i, prompt in enumerate(encoded.prompts):
        p, later = len(prompt), [len(responses[i]) - 1 for responses in encoded.responses.values()]
        positions += p + sum(later)
        context += p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in later)
        predictions += 1 + sum(later)
    return layers * (24 * width**2 * positions + 4 * width * context) + 2 * width * vocabulary * predictions


def in_fresh_process(way: str, shape: str, prompts: int, device: str, threads: int) -> dict:
    """Run one way in a process of its own; returns its `seconds` and the `memory_mb` that it gained."""
    words = [sys.executable, "-m", "benchmarks.bench", "one", way, shape, str(prompts), device, str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _one(way: str, shape: str, count: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = random_model(shape, device)
    vocabulary = model.config.vocab_size
    if way in WAYS:
        encoded, small = random_probes(vocabulary, int(count)), random_probes(vocabulary, 1, (2, 2), (2, 2))
        work, warm_up = (lambda: WAYS[way](model, encoded)), lambda: WAYS[way](model, small)
    else:
        texts, small = random_texts(vocabulary, int(count), _tokens(shape)), random_texts(vocabulary, 1, 2)
        work, warm_up = (lambda: _predict(way, model, texts)), lambda: by_one_jvp(model, small[0], small[1:])
    warm_up()  # what the libraries load at first

    def gained() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else cache.peak_memory_mb()

    before = gained() if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    spent, _ = seconds(work, device)
    print(json.dumps({"seconds": spent, "memory_mb": round(gained() - before)}))


def _predict(way: str, model, texts: list[Text]) -> Tensor:
    return PREDICTIONS[way](model, texts[0], texts[1:])


def _tokens(shape: str) -> int:
    return 2 if shape == "0.4M" else 16  # two tokens are what explicit Jacobians have room for


# --- the report --------------------------------------------------------------------------------------------


def compare(shape: str, repeats: int, device: str, prompts: int | None = None, **lengths) -> list[dict]:
    """The three ways in turn, `repeats` times. One row each: seconds, ratios to the shared way, share, difference."""
    model = random_model(shape, device)
    encoded = random_probes(model.config.vocab_size, prompts or SHAPES[shape][-1], **lengths)
    spent, results, rates = {way: [] for way in WAYS}, {}, []
    for way in WAYS.values():
        way(model, encoded.only("00000"))
    shared(model, encoded)  # checks the model, which happens once
    for _ in range(repeats):
        rates.append(matrix_rate(device))
        for name, way in WAYS.items():
            time_, results[name] = seconds(lambda way=way: way(model, encoded), device)
            spent[name].append(time_)
    tokens = {(i, kind): len(r) for kind, each in encoded.responses.items() for i, r in enumerate(each)}
    work = unique_operations(shape, encoded)
    rows = []
    for name in WAYS:
        pairs = [(results[name][key], results["shared prompts"][key], n) for key, n in tokens.items()]
        rows.append(
            {
                "model": shape,
                "way": name,
                "prompts": len(encoded.prompts),
                "seconds": statistics.median(spent[name]),
                "ratio": statistics.median(a / b for a, b in zip(spent[name], spent["shared prompts"], strict=True)),
                "share": statistics.median(work / s / rate for s, rate in zip(spent[name], rates, strict=True)),
                "difference": max(abs(a[k] - b[k]) / n for a, b, n in pairs for k in (0, 1)),  # nats per token
            }
        )
    return rows


def compare_predictions(shape: str, count: int, ways: list[str], repeats: int, device: str) -> list[dict]:
    """Ways to predict `count` responses in turn, `repeats` times. One row each: seconds, ratio to one jvp, how many
    forward passes over the same responses that is, and the largest difference as a share of the largest change."""
    model = random_model(shape, device)
    texts = random_texts(model.config.vocab_size, count, _tokens(shape))
    spent, results, forward = {way: [] for way in ways}, {}, []
    for way in ways:
        if way != "explicit kernel":
            _predict(way, model, texts[:2])
    for _ in range(repeats):
        forward.append(seconds(lambda: first_order.logps(model, texts[1:]), device)[0])
        for way in ways:
            time_, results[way] = seconds(lambda way=way: _predict(way, model, texts), device)
            spent[way].append(time_)
    exact = results["one jvp"]
    return [
        {
            "model": shape,
            "parameters": sum(p.numel() for p in model.parameters()),
            "observations": count,
            "way": way,
            "seconds": statistics.median(spent[way]),
            "ratio": statistics.median(a / b for a, b in zip(spent[way], spent["one jvp"], strict=True)),
            "forwards": statistics.median(a / b for a, b in zip(spent[way], forward, strict=True)),
            "difference": ((results[way].to(exact) - exact).abs().max() / exact.abs().max()).item(),
        }
        for way in ways
    ]


def prediction_cases() -> list[tuple[str, int, list[str]]]:
    """Model, number of responses and ways: the explicit kernel on the smallest model only."""
    few = [way for way in PREDICTIONS if way != "explicit kernel"]
    return [("0.4M", 1, list(PREDICTIONS)), *(("built-in", n, few) for n in (8, 32, 128)), ("6M", 32, few)]


def bench(repeats: int = 3, device: str = "cpu", threads: int = 1, out: Path | None = None) -> dict:
    """Measure everything and write it as JSON to `out` (default `runs/bench.json`); `report` makes it readable.

    Raises `InputError` for a device that is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} is not available (allowed: cpu)")
    torch.set_num_threads(threads)
    out = out or store.runs_root() / "bench.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    begins = pool.stages(STAGES)
    next(begins)
    # Memory first: on Linux a new process starts with its parent's peak.
    growth = [
        {"prompts": n, **in_fresh_process("shared prompts", "built-in", n, device, threads)} for n in (48, 192, 768)
    ]
    memory = {
        (shape, way): in_fresh_process(way, shape, SHAPES[shape][-1], device, threads)["memory_mb"]
        for shape in SHAPES
        for way in WAYS
    }
    predicting = {
        (shape, count, way): in_fresh_process(way, shape, count, device, threads)["memory_mb"]
        for shape, count, ways in prediction_cases()
        for way in ways
    }
    next(begins)
    ways = [row for shape in SHAPES for row in compare(shape, repeats, device)]
    ways = [row | {"memory_mb": memory[row["model"], row["way"]]} for row in ways]
    next(begins)
    lengths = []
    for n in (32, 64, 128, 256):
        ratios = {row["way"]: row["ratio"] for row in compare("built-in", repeats, device, 6, prompt_tokens=(n, n))}
        lengths.append({"prompt_tokens": n, "authors": ratios["the authors' way"], "plain": ratios["plain batches"]})
    growth = [row | {"each": 1e3 * row["seconds"] / row["prompts"]} for row in growth]
    setting = {"device": device, "threads": threads, "repeats": repeats, "matrix_gflops": matrix_rate(device) / 1e9}
    setting |= {
        "recorded": store.now(),
        "git": cache.git_state(),
        "versions": reach.versions("lddyn.engine.probes", "measure"),
    }
    measured = {**setting, "ways": ways, "prompt_lengths": lengths, "growth": growth}
    next(begins)
    measured["predictions"] = [
        row | {"memory_mb": predicting[row["model"], row["observations"], row["way"]]}
        for case in prediction_cases()
        for row in compare_predictions(*case, repeats, device)
    ]
    next(begins)
    measured["influences"] = [row for case in INFLUENCES for row in compare_influences(*case, 1, device)]
    store.write_json(out, measured)
    return measured


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    top.add_argument("--repeats", type=positive, default=3)
    top.add_argument("--device", default="cpu", help="cpu or cuda")
    top.add_argument("--threads", type=positive, default=1)
    top.add_argument("--out", type=Path, help="JSON file (default: runs/bench.json)")
    a = top.parse_args()
    pool.show_progress()
    try:
        print(pages.report(bench(a.repeats, a.device, a.threads, a.out)))
    except InputError as error:
        print(f"lddyn: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:  # a fresh process of `in_fresh_process`
        _one(*sys.argv[2:])
    else:
        sys.exit(main())
