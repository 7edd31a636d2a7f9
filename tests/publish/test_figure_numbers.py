"""The extension of the book that numbers figures."""

import sys
from types import SimpleNamespace

from lddyn.engine.store import ROOT


def test_a_figure_is_not_numbered_through_the_whole_book(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "book" / "_ext"), *sys.path])
    import figure_numbers

    counted = {
        "notebooks/01_mnist": {"figure": {"a": (1,), "b": (2,)}},
        "notebooks/04_squeezing": {"figure": {"c": (3,)}, "table": {"t": (1,)}},
        "intro": {"figure": {"d": (4,)}},
    }
    figure_numbers.number(None, SimpleNamespace(toc_fignumbers=counted))
    assert counted == {
        "notebooks/01_mnist": {"figure": {"a": (1, 1), "b": (1, 2)}},
        "notebooks/04_squeezing": {"figure": {"c": (4, 1)}, "table": {"t": (1,)}},
        "intro": {"figure": {"d": (4,)}},
    }
