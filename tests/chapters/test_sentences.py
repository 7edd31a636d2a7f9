"""A sentence says what its table says, or the page says that it does not."""

import json

import pytest

from lddyn import InputError
from lddyn.chapters import claims, sentences
from lddyn.engine import store
from lddyn.engine.store import Run
from lddyn.publish import build, display, notebooks, pages

RISING = {"chosen": 5.0, "rejected": -3.0, "unrelated": 0.0}


def table_of(ends, seeds=3):
    """SFT that moves each type from 0 to its end, a little different for each seed."""
    rows = [
        (step, step, f"train/{n}", kind, "logp_sum", step * end * (1 + 0.01 * seed) + (seed - 1) * (end == 0) * step)
        for seed in range(seeds)
        for n in range(2)
        for step in (0, 1)
        for kind, end in ends.items()
    ]
    each = len(rows) // seeds
    return store.long(rows).assign(seed=[n // each for n in range(len(rows))])


def said(text, table=None):
    table = table_of(RISING) if table is None else table
    return sentences.said(text, "03_sft", lambda _: [rows for _, rows in table.groupby("seed")])


def test_a_sentence_shows_the_value_that_it_asserts():
    text, refuted = said("Chosen rises by {{change(kind=chosen) > 0 | .2f}} nats.")
    assert (text, refuted) == ("Chosen rises by 5.05 [4.93, 5.17] nats.", [])


def test_a_false_sentence_is_told_by_the_page_and_to_the_build():
    text, refuted = said(
        "True: {{change(kind=chosen) > 0}}.\n\n- It falls: {{change(kind=chosen) < 0}}.\n- So {{change(kind=chosen)}}"
    )
    first, items = text.split("\n\n")
    assert not first.startswith("**") and items.startswith("- **These runs say otherwise.** It falls")
    assert refuted[0].startswith("{{change(kind=chosen) < 0}} fails: ")


def test_what_the_runs_leave_open_is_not_asserted():
    text, refuted = said("Unrelated text falls: {{change(kind=unrelated) < 0}}.")
    assert text.startswith("**These runs do not decide this.** ") and len(refuted) == 1
    assert not said("It stays: {{change(kind=unrelated) around 0}}.").refuted
    assert said("It stays: {{change(kind=chosen) around 0}}.").refuted


def test_one_seed_decides_nothing():
    assert said("Up: {{change(kind=chosen) > 0}}.", table_of(RISING, seeds=1)).refuted
    assert not said("It moves by {{change(kind=chosen)}}.", table_of(RISING, seeds=1)).refuted


def test_what_was_not_measured_is_not_asserted():
    assert "(not measured)" in said("Up: {{change(kind=other_train) > 0}}.").text


def test_an_admonition_stays_one_and_a_relation_may_hide_its_value():
    text, refuted = said("```{admonition} Takeaway\n:class: tip\nIt falls{{change(kind=chosen)\n< 0 | none}}.\n```\n")
    assert text.startswith("```{admonition} Takeaway\n:class: tip\n**These runs say otherwise.** It falls.\n```")
    assert refuted == ["{{change(kind=chosen) < 0 | none}} fails: see the table"]


def test_formulas_are_not_taken_for_assertions():
    text = r"Of $\frac{\log\pi}{\mathcal{G}}$ and {numref}`fig-03-kinds`."
    assert said(text) == (text, [])


@pytest.mark.parametrize(
    "text", ["change", "change >", "no_such > 0", "change(kind=) > 0", "change(kind=chosen) >= 0", "rise fall"]
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(InputError):
        said(f"{{{{{text}}}}}")


def test_all_texts_of_the_book_can_be_read():
    for name in pages.chapters():
        cells = json.loads(notebooks.notebook_path(name).read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert sentences.assertions(code, name), f"{name} asserts nothing"
    assert all(sentences.assertions(e["why"], e["chapter"]) for e in claims.ledger() if "why" in e)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Makes a book of one executed page that asserts something, and returns what of it is not borne out."""

    def made(text, scale="laptop", about="laptop"):
        bundle = display.Said("03_sft", scale, table_of(RISING), text, about)._repr_mimebundle_()
        cells = [{"cell_type": "code", "source": "", "outputs": [{"output_type": "display_data", "data": bundle}]}]
        (tmp_path / "03_sft.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
        monkeypatch.setattr(pages, "EXECUTED", tmp_path)
        monkeypatch.setattr(pages, "chapters", lambda: ["03_sft"])
        return build.refuted([], scale)

    return made


def test_the_strict_build_names_a_planted_false_sentence(page):
    assert not page("Chosen rises: {{change(kind=chosen) > 0}}.")
    (line,) = page("Chosen falls: {{change(kind=chosen) < 0}}.")
    assert line.startswith("03_sft: {{change(kind=chosen) < 0}} fails: 5.05")


def test_what_was_written_about_another_scale_is_no_mistake_but_what_is_recorded_is(page):
    assert not page("Chosen falls: {{change(kind=chosen) < 0}}.", scale="smoke")
    assert page("Chosen falls: {{change(kind=chosen) < 0}}.", scale="smoke", about="recorded")
    note = display.Said("03_sft", "smoke", table_of(RISING), "Text.")._repr_mimebundle_()["text/markdown"]
    assert note.startswith("*Written about runs at scale laptop; these are at scale smoke.*\n\nText.")


@pytest.fixture
def ledger(monkeypatch):
    """One claim that fails, with a reason."""

    def made(why):
        part = {"statistic": "change", "arguments": {"kind": "chosen"}, "holds": "< 0", "says": "chosen"}
        entry = {"id": 1, "claim": "It falls", "source": "-", "paper": "-", "chapter": "03_sft", "parts": [part]}
        monkeypatch.setattr(claims, "ledger", lambda: [entry | ({"why": why} if why else {})])
        tables = [rows.drop(columns="seed") for _, rows in table_of(RISING).groupby("seed")]
        runs = [Run(None, rows, {"parameters": {"seed": n}}) for n, rows in enumerate(tables)]
        (judged,) = claims.verdicts({"03_sft": {"scale": "laptop", "runs": runs}})
        assert judged["verdict"] == "contradicted"
        return judged

    return made


def test_a_reason_stands_only_where_the_runs_bear_it_out(ledger, page):
    page("Nothing asserted.")
    right, wrong = ledger("It rises by {{change(kind=chosen) > 0 | .0f}}."), ledger("By {{change(kind=chosen) < 0}}.")
    assert right["why"].startswith("It rises by 5 [") and wrong["why"] is None
    assert not build.refuted([right], "laptop")
    assert build.refuted([wrong], "laptop")[0].startswith("claims.yml, claim 1: {{change(kind=chosen) < 0}} fails")
    assert build.refuted([ledger("")], "laptop") == ["claims.yml, claim 1 is contradicted, and has no why"]
