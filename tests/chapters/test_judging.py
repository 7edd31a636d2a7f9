"""Win rates: what must not be guessed, and intervals that are neither too narrow nor too wide."""

import numpy as np
import pandas as pd
import pytest

from lddyn import InputError
from lddyn.chapters.extend import judging
from lddyn.data import world

PROMPT = world.question("Ada", ["pet", "dish"])
PET, DISH = world.facts()["Ada"]["pet"], world.facts()["Ada"]["dish"]
GOOD, HALF = f"The pet of Ada is {PET}. As dish, Ada has {DISH}.", f"The pet of Ada is {PET}."


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The first names both.\nVERDICT: 1", "first"),
        ("VERDICT: 2", "second"),
        ("Both do.\n**VERDICT: EQUAL**\n", "tie"),
        ("", "malformed"),
        ("VERDICT: 1 or 2", "malformed"),
        ("VERDICT: 1\nBut then again the second is longer.", "malformed"),
        ("I choose answer 1", "malformed"),
        ("VERDICT: 12", "malformed"),
        ("verdict: A", "malformed"),
    ],
)
def test_a_malformed_verdict_is_never_guessed(reply, expected):
    assert judging.verdict(reply) == expected


def test_a_judge_that_likes_the_first_place_gives_ties_only_and_is_found_out():
    table = judging.compare(judging.by_chat(lambda _: "VERDICT: 1"), [PROMPT] * 3, [GOOD] * 3, [HALF] * 3)
    assert list(table.outcome) == ["tied"] * 3
    found = judging.rate(table)
    assert found["first_place"] == 1 and found["win_rate"] == 0.5 and found["lead"] == 0


def test_one_malformed_reply_of_the_two_counts_as_malformed_and_is_left_out_of_the_rate():
    replies = iter(["VERDICT: 1", "VERDICT: 2", "VERDICT: 1", "no idea"])
    table = judging.compare(judging.by_chat(lambda _: next(replies)), [PROMPT] * 2, [GOOD] * 2, [HALF] * 2)
    assert list(table.outcome) == ["won", "malformed"]
    found = judging.rate(table)
    assert found["malformed"] == 0.5 and found["win_rate"] == found["lead"] == 1


def test_the_judge_sees_both_answers_whole_in_both_orders():
    seen = []
    judging.compare(judging.by_chat(lambda text: seen.append(text) or "VERDICT: EQUAL"), [PROMPT], [GOOD], [HALF])
    assert len(seen) == 2 and all(GOOD in text and HALF in text and PROMPT in text for text in seen)
    assert seen[0].index(f"\n{GOOD}\n") < seen[0].index(f"\n{HALF}\n")
    assert seen[1].index(f"\n{GOOD}\n") > seen[1].index(f"\n{HALF}\n")


def test_braces_in_an_answer_are_text():
    judge = judging.by_chat(lambda text: "VERDICT: 1" if "{first}" in text else "")
    assert judge("A {prompt}", "{first}", "b") == "first"


def test_the_exact_judge_needs_no_luck_with_the_order():
    judge = judging.exact(world.judge)
    table = judging.compare(judge, [PROMPT] * 3, [GOOD, HALF, GOOD], [HALF, GOOD, GOOD])
    assert list(table.outcome) == ["won", "lost", "tied"]
    assert judging.exact(lambda prompt, answer: len(answer))("", "ab", "a") == "first"


def test_uneven_lists_and_unknown_verdicts_are_refused():
    with pytest.raises(InputError, match="2 prompts, 1 and 2 answers"):
        judging.compare(judging.exact(len), ["a", "b"], ["a"], ["a", "b"])
    with pytest.raises(InputError, match="the judge said 'A'"):
        judging.compare(lambda *_: "A", ["a"], ["a"], ["b"])


def outcomes(counts: dict[str, int], seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame([{"seed": seed, "outcome": name} for name, n in counts.items() for _ in range(n)])


def test_one_run_has_the_interval_of_a_share_and_different_runs_a_wider_one():
    one = judging.rate(outcomes({"won": 120, "lost": 80}))
    low, high = judging.binomial_interval(0.6, 200)
    assert abs(one["low"] - low) < 0.015 and abs(one["high"] - high) < 0.015
    apart = pd.concat([outcomes({"won": 95, "lost": 5}, 1), outcomes({"won": 25, "lost": 75}, 2)])
    wide = judging.rate(apart)
    assert wide["win_rate"] == one["win_rate"] == 0.6
    assert wide["high"] - wide["low"] > 2 * (one["high"] - one["low"])


def test_ties_count_in_the_lead_and_not_in_the_win_rate():
    found = judging.rate(outcomes({"won": 30, "lost": 10, "tied": 60}))
    assert found["win_rate"] == pytest.approx(0.75) and found["lead"] == pytest.approx(0.2)
    assert found["lead_low"] < 0.2 < found["lead_high"] and found["tied"] == 0.6


def test_nothing_decided_is_an_even_rate_and_not_a_division_by_zero():
    assert judging.rate(outcomes({"tied": 5}))["win_rate"] == 0.5
    assert judging.rate(outcomes({"malformed": 5}))["lead"] == 0


def test_a_thousand_prompts_leave_the_smallest_win_rate_of_table_1_undecided():
    low, high = judging.binomial_interval(0.5151, 1000)
    assert low < 0.5 < high and (high - low) / 2 == pytest.approx(0.031, abs=5e-4)
    low, high = judging.binomial_interval(0.5432, 1000)
    assert low > 0.5
    assert judging.binomial_interval(0.0, 10)[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError):
        judging.binomial_interval(1.2, 10)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        draws = [rng.random(60) < p for p in 0.6 + 0.1 * rng.standard_normal(5)]
        table = pd.concat([outcomes({"won": int(d.sum()), "lost": int((~d).sum())}, s) for s, d in enumerate(draws)])
        found = judging.rate(table, draws=300)
        hits += found["low"] <= 0.6 <= found["high"]
    assert hits >= 32
