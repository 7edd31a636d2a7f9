from dataclasses import dataclass

import pytest

from lddyn import InputError
from lddyn.engine.settings import choose, derive

SCALES = {"smoke": {"lr": 1e-3, "epochs": 2, "unused": 1}, "laptop": {"lr": 1e-4, "epochs": 8}}


@dataclass(frozen=True)
class Chapter:
    lr: float
    epochs: int
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    seed: int
    lr: float
    device: str


def test_a_scale_gives_what_is_not_given_and_other_names_are_left_alone():
    assert choose(Chapter, SCALES, "smoke", {"lr": None, "epochs": 3, "In": []}) == Chapter(1e-3, 3)
    with pytest.raises(InputError, match="unknown scale 'big'"):
        choose(Chapter, SCALES, "big", {})


def test_a_run_takes_what_it_knows_from_its_chapter_and_must_be_whole():
    assert derive(Run, Chapter(0.1, 2), seed=7) == Run(7, 0.1, "cpu")
    assert derive(Run, Chapter(0.1, 2), seed=7, lr=0.2).lr == 0.2
    with pytest.raises(TypeError, match="seed"):
        derive(Run, Chapter(0.1, 2))
