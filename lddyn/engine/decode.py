"""What a model says by itself: greedy answers and samples (section 4.2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lddyn.engine import probe_set, probes
from lddyn.engine.probe_set import Tokenizer
from lddyn.theory.first_order import Model
from lddyn.theory.logprobs import token_stats


class Decoded(NamedTuple):
    """One continuation: its text, its token ids (end of text included when reached) and its log-probability in nats."""

    text: str
    tokens: list[int]
    logp: float  # summed over the tokens


def greedy(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    max_prompt: int = 256,
    batch_size: int = 32,
    format: str = "auto",
) -> list[Decoded]:
    """Greedy decoding: the likeliest token after each prompt, again and again, until end of text or `max_new_tokens`.

    Unlike y* along a given response, every token follows the model's own earlier choices (section 4.2).
    """
    how = (max_new_tokens, max_prompt, batch_size, format)
    return _decode(model, tokenizer, prompts, lambda logits, *_: logits.argmax(-1), *how)


def sample(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    max_prompt: int = 256,
    batch_size: int = 32,
    format: str = "auto",
) -> list[Decoded]:
    """Sample at temperature 1, as for `chosen_initial`, from the untouched model.

    The randomness of a prompt depends on `seed` and its place among `prompts`, not on the batches, and the global
    random state is neither used nor changed.
    """
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def choose(logits: Tensor, rows: list[int], step: int) -> Tensor:
        cumulative = logits.double().softmax(-1).cumsum(-1)  # (rows, V)
        u = draws[rows, step].to(logits.device).unsqueeze(-1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    return _decode(model, tokenizer, prompts, choose, max_new_tokens, max_prompt, batch_size, format)


def _decode(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    choose: Callable[[Tensor, list[int], int], Tensor],
    max_new_tokens: int,
    max_prompt: int,
    batch_size: int,
    format: str,
) -> list[Decoded]:
    encoded = [probe_set.encode_prompt(tokenizer, prompt, max_prompt, format) for prompt in prompts]
    end, results = tokenizer.eos_token_id, {}
    ends = {end, *probe_set.ends_of_turn(tokenizer, prompts, format)}
    stops = torch.tensor(sorted(ends), device=model.device)
    keyword = probes.cache_keyword(probes.unwrapped(model).__class__)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with probes.probing(model):
        for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            width = max(len(encoded[i]) for i in rows)
            pad = [width - len(encoded[i]) for i in rows]
            ids = torch.tensor([[end] * n + encoded[i] for n, i in zip(pad, rows, strict=True)], device=model.device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=model.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            keys_values, tokens, logps = None, [], []
            for step in range(max_new_tokens):
                out = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions,
                    use_cache=True, logits_to_keep=1, **{keyword: keys_values},
                )  # fmt: skip
                keys_values, logits = getattr(out, keyword), out.logits[:, -1]  # (rows, V)
                ids = choose(logits, rows, step).unsqueeze(1)
                tokens.append(ids)
                logps.append(token_stats(logits, ids.squeeze(1)).logp)
                if torch.isin(torch.cat(tokens, 1), stops).any(1).all():
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                positions = positions[:, -1:] + 1
            each = torch.stack(logps, 1).double()  # (rows, steps)
            for row, (i, mine) in enumerate(zip(rows, torch.cat(tokens, 1).tolist(), strict=True)):
                mine = mine[: next((n for n, token in enumerate(mine, 1) if token in ends), len(mine))]
                text = tokenizer.decode(mine, skip_special_tokens=True)
                results[i] = Decoded(text, mine, each[row, : len(mine)].sum().item())
    return [results[i] for i in range(len(prompts))]
