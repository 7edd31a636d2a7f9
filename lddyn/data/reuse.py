"""Spans of one text in another: what a generated answer takes over word by word from answers to other questions."""

from lddyn.data.responses import words


def ngrams(text: str, n: int = 4) -> set[tuple[str, ...]]:
    """The runs of `n` words of a text."""
    w = words(text)
    return {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}


def share(text: str, source: set[tuple[str, ...]], n: int = 4) -> float:
    """Share of the runs of `n` words of `text` that are in `source`, 0 to 1; 0 for a text that is shorter."""
    w = words(text)
    runs = [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]
    return sum(run in source for run in runs) / len(runs) if runs else 0.0
