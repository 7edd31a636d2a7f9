"""Chapter 4: single steps on small distributions, nothing of it random: who rises, who falls, and who pays."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from lddyn.chapters.squeezing.run import Chapter
from lddyn.theory import losses, softmax

Moved = tuple[Tensor, Tensor, list[Tensor]]  # probabilities before and after, (V,) each; the labels with a force


def regimes(settings: Chapter) -> dict[str, Moved]:
    """Five single steps on distributions over ranked labels: the four regimes of appendix E, and push with pull."""
    vocab, eta = settings.vocab, settings.strength
    flat, peaked = softmax.zipf(vocab, 0.2), softmax.zipf(vocab, settings.peakiness)
    p, middle, likely = peaked.softmax(-1), torch.tensor(vocab // 2), torch.tensor(2)
    valley, pulled = torch.tensor(vocab - 1), torch.tensor(vocab * 4 // 5)
    both = peaked - eta * (losses.sft(p, pulled) - losses.sft(p, valley))
    steps = {
        "A: pull, flat": (flat, softmax.step(flat, middle, eta), [middle]),
        "B: push, flat": (flat, softmax.step(flat, middle, -eta), [middle]),
        "C: push, near the peak": (peaked, softmax.step(peaked, likely, -eta), [likely]),
        "D: push, in the valley": (peaked, softmax.step(peaked, valley, -eta), [valley]),
        "E: push and pull": (peaked, both, [valley, pulled]),
    }
    return {name: (z.softmax(-1), new.softmax(-1), labels) for name, (z, new, labels) in steps.items()}


def outputs(vocab: int) -> dict[str, Moved]:
    """The same push at the least likely label through softmax, sparsemax and sigmoids, from the same p."""
    p, valley = softmax.zipf(vocab, 1.0).softmax(-1), torch.tensor(vocab - 1)
    kinds = {
        "softmax": (p.log(), softmax.softmax),
        "sparsemax": (p, softmax.sparsemax),
        "sigmoid": (p.logit(), torch.sigmoid),
    }
    return {name: (p, out(softmax.step(z, valley, -1.0, out)), [valley]) for name, (z, out) in kinds.items()}


def forces(margins: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The force of every loss on chosen and on rejected at these margins, (margins,) each; answers of 20 tokens."""
    pair, tokens = softmax.with_margin(margins), {"chosen_length": 20, "rejected_length": 20}
    return {title: losses.value(loss.force, *pair, **tokens) for title, loss in losses.titled().items()}


def who_gains(cases: Mapping[str, Moved]) -> pd.DataFrame:
    """For each step: the label with the force and y* before and after, entropy, who else rises, and who paid for y*."""
    rows = {}
    for name, (p, q, labels) in cases.items():
        y, pushed = labels[0], len(labels) == 1 and q[labels[0]] < p[labels[0]]
        top, others = softmax.top_other(p, y), [i for i in range(len(p)) if i not in labels]
        rows[name] = {
            "label with the force": _arrow(p[y], q[y]),
            "y*": _arrow(p[top], q[top]),
            "entropy (nats)": _arrow(*(torch.special.entr(v).sum() for v in (p, q))),
            "other labels that rise": f"{int((q > p)[others].sum())} of {len(others)}",
            "y*'s gain paid by labels nobody pushed": f"{softmax.account(p, q, y).share:.0%}" if pushed else "",
        }
    return pd.DataFrame(rows).T


def who_pays(outputs: Mapping[str, Moved]) -> pd.DataFrame:
    """For each kind of output: y* before and after the push, and how many of the other labels rise, fall and are 0."""
    rows = {}
    for name, (p, q, (pushed,)) in outputs.items():
        others = torch.arange(len(p)) != pushed
        rows[name] = {
            "y*": _arrow(p[0], q[0]),
            "other labels that rise": int((q > p)[others].sum()),
            "that fall": int((q < p)[others].sum()),
            "that are exactly 0": int((q == 0)[others].sum()),
        }
    return pd.DataFrame(rows).T


def _arrow(before, after) -> str:
    return f"{before:.3g} → {after:.3g}"
