"""The closed world: what its judge must not mistake, and what its examples must not give away."""

import pytest

from lddyn import InputError
from lddyn.data import preferences, responses, world
from lddyn.engine import pretraining

PROMPT = world.question("Ada", ["pet", "dish"])
PET, DISH = world.facts()["Ada"]["pet"], world.facts()["Ada"]["dish"]
BEST = f"The pet of Ada is {PET}. As dish, Ada has {DISH}. Last March the poet saw a lamp near the mill."
FILLER = BEST.split(". ")[-1]


def other(attribute, value):
    return next(v for v in world.VALUES[attribute] if v != value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (BEST, {"right": 2, "score": 2}),
        (" " + BEST, {"right": 2, "score": 2}),
        ("", {"missing": 2, "score": 0}),
        (f"The pet of Ada is {other('pet', PET)}. {BEST}", {"right": 2, "wrong": 1, "score": 1}),
        (f"The pet of Ada is {PET}. {BEST}", {"right": 2, "repeated": 1, "score": 1.5}),
        (f"{BEST} {FILLER}", {"right": 2, "off_topic": 1, "score": 1.5}),
        (
            f"The pet of Amos is {PET}. As dish, Ada has {DISH}.",
            {"right": 1, "missing": 1, "off_topic": 1, "score": 0.5},
        ),
        (f"so Ada got {PET} for pet. {DISH}, that's Ada and dish.", {"right": 2, "casual": 2, "score": 1}),
        (f"The pet of Ada is {DISH}. As dish, Ada has", {"missing": 2, "garbled": 2, "score": -1}),
        (BEST[:-1], {"right": 2, "garbled": 1, "score": 1.5}),
    ],
)
def test_the_judge_counts_every_sentence_once(answer, expected):
    score = world.judge(PROMPT, answer)._asdict()
    assert score == dict.fromkeys(world.Score._fields, 0) | expected


def test_a_question_of_another_kind_is_no_zero():
    with pytest.raises(InputError, match="the judge knows questions such as"):
        world.judge("Who is Ada?", BEST)


@pytest.mark.parametrize("design", world.DESIGNS)
def test_every_answer_is_what_its_kind_promises(design):
    casual_share, wrong_share = world.DESIGNS[design]
    rows = preferences.load(design, "train", limit=400)
    judged = {
        kind: [world.judge(e["prompt"], e[kind]) for e in rows] for kind in rows[0] if kind not in ("id", "prompt")
    }
    assert not any(score.garbled for scores in judged.values() for score in scores)
    assert {s.score for s in judged["chosen"]} == {s.score for s in judged["chosen_semantic"]} == {2.0}
    assert [s.score for s in judged["rejected"]] == [s.score for s in judged["rejected_semantic"]]
    assert all(s.score < 2 for s in judged["rejected"]) and all(s.wrong == 2 for s in judged["chosen_format"])
    assert abs(sum(s.casual for s in judged["rejected"]) / 800 - casual_share) < 0.06
    if casual_share == 1:
        assert abs(sum(s.wrong for s in judged["rejected"]) / 800 - wrong_share) < 0.06
    assert all(e[kind] != e[f"{kind}_semantic"] for e in rows for kind in ("chosen", "rejected"))


def test_no_test_question_is_trained_on_and_the_world_stays_the_same():
    train, test = (preferences.load("world", split) for split in ("train", "test"))
    assert len(train) == 3600 and len(test) == 880
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in test}
    assert train == preferences.load("world", "train")
    kinds = responses.response_types(train[:8], other_test=test[:8])
    assert set(kinds) == set(responses.RESPONSE_TYPES) - {"chosen_initial"}


def test_style_tells_casual_answers_apart_and_wrong_facts_not():
    def accuracy(design):
        rows = preferences.load(design, "train", limit=300)
        return responses.style_accuracy([e["chosen"] for e in rows], [e["rejected"] for e in rows])

    assert accuracy("world") > 0.95 and accuracy("world:facts") < 0.6


def test_documents_are_true_and_the_model_of_the_world_reads_nothing_else():
    texts, held_out = pretraining.documents({}, seed=0)
    assert len(texts) + len(held_out) == world.DOCUMENTS
    for text in texts[:300]:
        body = text.split(": ", 1)[1]
        for sentence in body.split(". "):
            found = world.read(sentence.rstrip(".") + ".")
            assert found == "filler" or world.facts()[found[0]][found[1]] == found[2]


def test_unknown_designs_and_splits_are_named():
    with pytest.raises(InputError, match="did you mean 'world:facts'"):
        preferences.load("world:fact")
    with pytest.raises(InputError, match="unknown split 'pretrain'"):
        preferences.load("world", "pretrain")
