import json
from pathlib import Path

import pytest

from lddyn import InputError
from lddyn.data import preferences, responses
from lddyn.workshop import chat, rephrase


@pytest.fixture
def mine(pairs, jsonl) -> Path:
    return jsonl(pairs(12), "mine.jsonl")


def text_of(prompt: str) -> str:
    return prompt.split("Text: ")[1].split("\n\nNew text:")[0]


def reverse(prompt: str) -> str:
    return " ".join(reversed(text_of(prompt).split())) + (" indeed" if "mould" in prompt else "")


@pytest.mark.filterwarnings("ignore::lddyn.Caution")
def test_what_is_written_is_read_as_data_with_all_types(mine, pairs, tmp_path):
    out = tmp_path / "out" / "rephrased.jsonl"
    report = rephrase.rephrase(str(mine), out, reverse)
    assert report["asked"] == 48 and report["left_out"] == [] and report["rows"] == {"train": 10, "test": 2}
    train, test = (preferences.load(str(out), split) for split in ("train", "test"))
    assert [e["chosen"] for e in test] == [" " + pairs(12)[i]["chosen"] for i in (5, 11)], "rows stay in their split"
    assert train[0]["chosen_semantic"] == " cats. the of each for four legs, 4 have They"
    assert train[0]["rejected_format"].endswith("indeed")
    types = responses.response_types(train, other_test=test)
    assert set(rephrase.KINDS) <= set(types)
    assert json.loads((tmp_path / "out" / "rephrased.jsonl.report.json").read_text())["prompts"]


def test_useless_answers_are_asked_again_then_counted_and_named_and_never_invented(mine, tmp_path):
    out, prompts = tmp_path / "out.jsonl", []

    def ask(prompt):
        prompts.append(prompt)
        text = text_of(prompt)
        if "They have 4 legs" in text and "mould" not in prompt and "earlier attempt" not in prompt:
            return text.upper()
        if "They have 8 legs" in text:
            return "  "
        if "They have 12 legs" in text:
            return "Certainly! " + text * 10
        return reverse(prompt)

    report = rephrase.rephrase(str(mine), out, ask)
    assert any("An earlier attempt was equal to the original." in p for p in prompts)
    whys = {(e["id"], e["type"], e["why"]) for e in report["left_out"]}
    assert ("2", "chosen_semantic", "empty") in whys and ("3", "chosen_format", "far too long") in whys
    assert "x chosen_semantic empty" in rephrase.summary(report)
    kept = preferences.load(str(out), "train")
    assert len(kept) == report["rows"]["train"] == 7
    assert not {e["id"] for e in kept} & {"2", "3", "4"}, "rows 4 and 2 share a count of legs"


def test_a_killed_job_goes_on_without_asking_twice(mine, tmp_path):
    asked = []

    def answer(prompt):
        if len(asked) == 20:
            raise KeyboardInterrupt
        asked.append(prompt)
        return reverse(prompt)

    ask = chat.Chat("test", answer, tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        rephrase.rephrase(str(mine), tmp_path / "out.jsonl", ask)
    assert not (tmp_path / "out.jsonl").exists()
    first = list(asked)
    asked.clear()
    asked.extend(["kept"] * 21)
    rephrase.rephrase(str(mine), tmp_path / "out.jsonl", ask)
    assert len(set(first) | set(asked)) - 1 == len(first) + len(asked) - 21 == 48


def test_types_that_the_data_has_are_kept_and_not_asked_for(pairs, jsonl, tmp_path):
    path = jsonl([row | {"chosen_gptsemantic": "Four legs for every single cat."} for row in pairs(12)])
    report = rephrase.rephrase(str(path), tmp_path / "out.jsonl", reverse, limit=2, workers=3)
    assert report["asked"] == 12
    assert preferences.load(str(tmp_path / "out.jsonl"))[0]["chosen_semantic"] == " Four legs for every single cat."
    with pytest.raises(InputError, match="has all of chosen_semantic"):
        rephrase.rephrase(str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl", reverse)


def test_no_file_of_somebody_else_is_overwritten(mine, tmp_path):
    other = tmp_path / "thesis.txt"
    other.write_text("years of work")
    for out, message in ((other, "was not written by rephrase"), (mine, "was not written by rephrase")):
        with pytest.raises(InputError, match=message):
            rephrase.rephrase(str(mine), out, reverse)
    assert other.read_text() == "years of work"


def test_a_model_that_gives_nothing_useful_is_one_line_and_no_file(mine, tmp_path):
    with pytest.raises(InputError, match="no row of split 'train' is left; 48 answers, 48 of no use") as error:
        rephrase.rephrase(str(mine), tmp_path / "out.jsonl", lambda _: "")
    assert "\n" not in str(error.value) and not (tmp_path / "out.jsonl").exists()


def test_braces_in_a_text_reach_the_model_as_they_are():
    assert "f'{text} {x!r}'" in rephrase.question("chosen_semantic", "f'{text} {x!r}'")


def test_quotation_marks_around_an_answer_go_and_those_inside_stay():
    assert rephrase.tidy(' "All of it." ') == "All of it."
    assert rephrase.tidy('"One" and "two"') == '"One" and "two"'
