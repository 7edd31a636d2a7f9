import json
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from lddyn import InputError
from lddyn.data import preferences, responses
from lddyn.data.preferences import load
from lddyn.data.responses import response_types, style_accuracy

AUTHORS_FILE = Path(__file__).parents[3] / "shared" / "data" / "authors" / "formal_prob_train.jsonl"
GIVEN = dict.fromkeys(["chosen_semantic", "chosen_format", "rejected_semantic", "rejected_format", "unrelated"], " x")
needs_builtin = pytest.mark.skipif(not preferences.BUILTIN.exists(), reason="the built-in set is not there yet")


def rows(count: int, start: int = 0) -> list[dict]:
    numbers = range(start, start + count)
    return [{"prompt": f"Q {i}\nA:", "chosen": f"good one {i}", "rejected": f"bad one {i}"} for i in numbers]


def examples(count: int, start: int = 0, given: dict = GIVEN) -> list[dict]:
    return [{"id": row["prompt"], **row, "chosen": " " + row["chosen"], **given} for row in rows(count, start)]


def write(path: Path, content: list) -> str:
    path.write_text("".join((c if isinstance(c, str) else json.dumps(c)) + "\n" for c in content))
    return str(path)


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"prompt": "Q", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "Q", "chosen": None, "rejected": "b"}, "no field 'chosen'"),
        ({"prompt": "Q", "chosen": " \n", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "Q", "chosen": "same", "rejected": " same"}, "chosen and rejected are equal"),
        ({"prompt": "Q", "chosen": "a", "rejected": 3}, "rejected is of type int"),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "unrelated": "c"},
            "'unrelated', which the first row does not",
        ),
        ({"prompt": "Q", "chosen": [{"role": "user"}], "rejected": "b"}, "chosen, message 1 has no 'content'"),
        ('{"prompt": "Q", ', "invalid JSON"),
        ('["a", "b"]', "not a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, bad, why):
    path = write(tmp_path / "mine.jsonl", [*rows(1), "", bad, *rows(3, 5)])
    with pytest.raises(InputError, match=rf"mine\.jsonl, line 3: .*{why}") as error:
        load(path)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"skipped 1 bad rows; the first: .*line 3"):
        assert [e["prompt"] for e in load(path, skip_bad_rows="rows")] == [f"Q {i}\nA:" for i in (0, 5, 6, 7)]


def test_limit_counts_good_rows_and_leaves_the_rest_unread(tmp_path):
    path = write(tmp_path / "mine.jsonl", [*rows(2), "not JSON", *rows(3, 5)])
    assert len(load(path, limit=2)) == 2
    with pytest.warns(UserWarning, match="skipped 1"):
        assert len(load(path, limit=3, skip_bad_rows="rows")) == 3


def test_a_file_without_splits_does_not_test_on_what_it_trains_on(tmp_path):
    path = write(tmp_path / "mine.jsonl", rows(30))
    train, test = ({e["prompt"] for e in load(path, split)} for split in ("train", "test"))
    assert len(train) == 25 and len(test) == 5 and not train & test
    with pytest.raises(InputError, match="no rows of split 'pretrain'"):
        load(path, "pretrain")
    named = write(tmp_path / "named.jsonl", [row | {"split": "test"} for row in rows(3)])
    assert len(load(named, "test")) == 3


def test_all_types_start_with_the_same_space(tmp_path):
    row = {"prompt": "Q\nA: ", "chosen": " yes", "rejected": "no", "irr_hum": "  a ferry\n", "chosen_selfr": "x"}
    (example,) = load(write(tmp_path / "mine.jsonl", [row]))
    assert example == {"id": "1", "prompt": "Q\nA:", "chosen": " yes", "rejected": " no", "unrelated": " a ferry"}


def test_messages_become_one_prompt_and_two_answers(tmp_path):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    again, no, yes = {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "No"}, "Yes"
    chosen = [user, answer, again, {"role": "assistant", "content": yes}]
    implicit = {"prompt": "Hi", "chosen": chosen, "rejected": [*chosen[:3], no]}
    explicit = {"prompt": chosen[:3], "chosen": chosen[3:], "rejected": [no]}
    for example in load(write(tmp_path / "mine.jsonl", [implicit, explicit])):
        assert example["prompt"] == "Human: Hi\nAssistant: Hello\nHuman: Well?\nAssistant:"
        assert (example["chosen"], example["rejected"]) == (" Yes", " No")


def test_hub_sources_find_their_splits_and_prompts(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant:"
    hh, chat = tmp_path / "hh" / "helpful-base", tmp_path / "chat"
    hh.mkdir(parents=True)
    chat.mkdir()
    write(hh / "train.jsonl", [{"chosen": dialogue + " Yes", "rejected": dialogue + " No"}] * 2)
    write(hh / "test.jsonl", [{"chosen": dialogue + " Yes", "rejected": "\n\nHuman: Ho\n\nAssistant: No"}])
    turn = {"role": "user", "content": "Hi"}
    answers = {name: [turn, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    write(chat / "train.jsonl", [{"prompt": "Hi", "messages": [], **answers}])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(preferences.HUB, "hh", (str(tmp_path / "hh"), *preferences.HUB["hh"][1:]))
    first = load("hh", limit=1)[0]
    assert (first["prompt"], first["chosen"], first["rejected"]) == (dialogue, " Yes", " No")
    with pytest.raises(InputError, match=r"test, row 0: chosen and rejected answer different prompts"):
        load("hh", "test")
    assert load(str(chat))[0]["prompt"] == "Human: Hi\nAssistant:"
    with pytest.raises(InputError, match="cannot load split 'nowhere'"):
        load(str(chat), "nowhere")


def test_a_hub_set_that_is_not_cached_is_one_line_without_a_network(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'nobody/has-this'.*without a network: data='builtin'") as error:
        load("nobody/has-this")
    assert "\n" not in str(error.value)


def test_a_mistyped_source_gets_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'builtin'"):
        load("bultin")


@pytest.mark.skipif(not AUTHORS_FILE.exists(), reason="the authors' probing set is not here")
def test_the_authors_file_gives_all_twelve_types():
    with pytest.warns(UserWarning, match="skipped .* is empty"):
        some = load(str(AUTHORS_FILE), skip_bad_rows="rows")
    assert len(some) >= 400
    assert list(response_types(some)) == list(responses.RESPONSE_TYPES)
    assert 0.45 < style_accuracy([e["chosen"] for e in some], [e["rejected"] for e in some]) < 0.6


@needs_builtin
def test_plausible_answers_keep_the_form_of_an_answer_that_they_are_not():
    texts, chosen = preferences.plausible("builtin"), {e["id"]: e["chosen"] for e in load("builtin", "train", 60)}
    assert texts.keys() == chosen.keys() and preferences.plausible("mine.jsonl") == {}
    for name, text in texts.items():
        own, form = (set(responses.words(t)) for t in (chosen[name], text))
        assert text.startswith(" ") and not text.startswith("  ")
        assert 0.8 < len(text.split()) / len(chosen[name].split()) < 1.2, name
        assert 0.15 < len(own & form) / len(own | form) < 0.65, name  # words of the frame, and others


# --- response types ----------------------------------------------------------------------------------------


def test_other_train_is_never_the_own_answer():
    some = examples(7)
    for seed in range(20):
        others = response_types(some, examples(3, 100), seed=seed)["other_train"]
        assert sorted(others) == sorted(e["chosen"] for e in some)  # each answer once
        assert all(other != e["chosen"] for other, e in zip(others, some, strict=True))
    assert others != response_types(some, examples(3, 100), seed=1)["other_train"]


def test_a_repeated_answer_does_not_count_as_another_one():
    some = [e | {"chosen": " Sure."} for e in examples(4)] + examples(1, 9)
    others = response_types(some, examples(3, 100))["other_train"]
    assert others[:4] == [" good one 9"] * 4 and others[4] == " Sure."


def test_other_test_comes_from_the_test_split_and_not_from_the_own_prompt():
    test = examples(5, 100)
    on_train = response_types(examples(12), test)["other_test"]
    assert Counter(on_train).keys() == {e["chosen"] for e in test} and max(Counter(on_train).values()) == 3
    on_test = response_types(test, test, other_train=examples(12))
    assert all(other != e["chosen"] for other, e in zip(on_test["other_test"], test, strict=True))
    assert all(int(text.split()[-1]) < 12 for text in on_test["other_train"])


def test_shuffled_types_keep_the_words_and_lose_the_order():
    long = " " + " ".join(map(str, range(40)))
    found = response_types([e | {"chosen": long + e["chosen"]} for e in examples(5)], examples(5, 100))
    for shuffled, source in [("chosen_shuffled", "chosen"), ("test_shuffled", "other_test")]:
        assert [sorted(t.split()) for t in found[shuffled]] == [sorted(t.split()) for t in found[source]]
        assert all(t.startswith(" ") for t in found[shuffled])
    assert found["chosen_shuffled"] != found["chosen"]
    assert list(found) == [name for name in responses.RESPONSE_TYPES if name in found]


def test_what_the_data_lack_is_left_out_by_name_and_what_they_have_is_kept():
    with pytest.warns(UserWarning, match=r"left out.*chosen_semantic.*other_test.*test_shuffled"):
        found = response_types(examples(3, given={}))
    assert list(found) == ["chosen", "rejected", "other_train", "chosen_shuffled"]
    theirs = GIVEN | {"other_train": " theirs", "other_test": " t", "test_shuffled": " s"}
    given = response_types(examples(3, given=theirs), examples(3, 100))
    assert all(given[name] == [text] * 3 for name, text in theirs.items())
    with pytest.warns(UserWarning, match="other_train"):
        assert "other_train" not in response_types(examples(1))


def test_style_accuracy_sees_style_and_only_style():
    plain = [f"Use tool {i % 7} for case {i % 11}." for i in range(60)]
    rambling = [f"Well, there are things such as {i % 7} or {i % 11}." for i in range(60)]
    swapped = [(a, b) if i % 2 else (b, a) for i, (a, b) in enumerate(zip(plain, rambling, strict=True))]
    assert style_accuracy(plain, rambling) > 0.95 and style_accuracy(plain, rambling, "char") > 0.95
    assert style_accuracy(*zip(*swapped, strict=True)) < 0.7
    with pytest.raises(InputError, match="at least 5 pairs"):
        style_accuracy(plain[:4], rambling[:4])


# --- the built-in set --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin() -> dict[str, list[dict]]:
    return {split: load(split=split) for split in ("train", "test", "pretrain")}


@needs_builtin
def test_the_builtin_set_is_large_enough_and_complete(builtin):
    assert len(builtin["train"]) >= 500 and len(builtin["test"]) >= 100 and len(builtin["pretrain"]) >= 150
    for split in ("train", "test"):
        found = response_types(builtin[split], builtin["test"], other_train=builtin["train"])
        assert list(found) == [name for name in responses.RESPONSE_TYPES if name != "chosen_initial"]
    assert all(e["prompt"].startswith("Question: ") and e["prompt"].endswith("\nAnswer:") for e in builtin["train"])
    ids = Counter(e["id"] for some in builtin.values() for e in some)
    assert max(ids.values()) == 1


@needs_builtin
def test_builtin_texts_are_clean_and_of_answer_length(builtin):
    for example in (e for some in builtin.values() for e in some):
        for name, text in example.items():
            where = f"{example['id']} {name}"
            assert text.replace("\nAnswer:", "").isprintable(), where
            assert "  " not in text and not text.endswith(" ") and "\ufffd" not in text, where
            if name in responses.RESPONSE_TYPES and name != "unrelated":
                assert 20 <= len(text.split()) <= 60, where


@needs_builtin
def test_no_builtin_text_appears_twice_across_splits(builtin):
    texts = {split: [e[k] for e in some for k in e if k != "id"] for split, some in builtin.items()}
    everything = [text for some in texts.values() for text in some]
    assert max(Counter(everything).values()) == 1
    words = TfidfVectorizer(ngram_range=(1, 2)).fit(everything)
    vectors = {split: words.transform(some) for split, some in texts.items()}
    for one, other in [("test", "train"), ("pretrain", "train"), ("test", "pretrain")]:
        near = (vectors[one] @ vectors[other].T).tocoo()
        i, j = near.row[near.data.argmax()], near.col[near.data.argmax()]
        assert near.data.max() <= 0.5, (texts[one][i], texts[other][j])


@needs_builtin
def test_chosen_and_rejected_differ_in_content_and_not_in_style(builtin):
    chosen, rejected = ([e[kind] for e in builtin["train"]] for kind in ("chosen", "rejected"))
    for size in (len, lambda text: len(text.split())):
        assert abs(sum(map(size, chosen)) / sum(map(size, rejected)) - 1) < 0.03
    assert style_accuracy(chosen, rejected) <= 0.6 and style_accuracy(chosen, rejected, "char") <= 0.6
