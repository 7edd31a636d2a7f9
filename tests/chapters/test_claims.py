import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import yaml

from lddyn import InputError
from lddyn.__main__ import main
from lddyn.chapters import claims, sentences, statistics
from lddyn.engine import recorded, store
from lddyn.engine.store import Run
from lddyn.workshop import report


def runs_with(values):
    table = store.long([(0, 0, "p", "all", "lbk_share_max", v) for v in [0.1]])
    return [Run(None, table.assign(value=v), {"parameters": {"seed": i}}) for i, v in enumerate(values)]


def part(holds, **more):
    return {"chapter": "01_mnist", "statistic": "lbk_share", "holds": holds, "says": "share"} | more


def test_every_claim_of_the_paper_is_listed_once_and_in_order():
    assert [entry["id"] for entry in claims.of_group(claims.ledger())] == list(range(1, 50))


def test_a_claim_beyond_the_paper_is_told_apart_and_comes_after_those_of_the_paper():
    """Otherwise it counts as one of the 49."""
    beyond = claims.of_group(claims.ledger(), "beyond")
    assert beyond and all(entry["id"] >= 50 and entry["chapter"] == "08_displacement" for entry in beyond)
    assert {entry.get("group") for entry in claims.ledger()} == {None, "beyond"}


def test_every_statistic_has_a_docstring_that_says_what_it_is():
    parts = [part for claim in claims.ledger() for part in claims.parts(claim)]
    assert all(sentences.statistic(part["chapter"], part["statistic"]).__doc__ for part in parts)


@pytest.mark.parametrize(
    ("values", "holds", "outcome"),
    [
        ([1.0, 1.1, 0.9], "> 0", "holds"),
        ([1.0, 1.1, 0.9], "< 0", "fails"),
        ([-1.0, 1.0, 0.5], "> 0", "undecided"),
        ([1.0], "> 0", "undecided"),
        ([1.0, 1.01, 0.99], "in [0.9, 1.1]", "holds"),
    ],
)
def test_the_whole_interval_decides(values, holds, outcome):
    assert claims.judge(part(holds), claims.by_seed(runs_with(values)))["outcome"] == outcome


def test_an_identity_is_judged_by_its_worst_seed():
    assert claims.judge(part("< 1", exact=True), claims.by_seed(runs_with([0.1, 0.2, 3.0])))["outcome"] == "fails"


@pytest.mark.parametrize("more", [{}, {"exact": True}])
def test_what_no_run_measures_is_undecided_and_says_so(more):
    judged = claims.judge(part("> 1") | more, claims.by_seed(runs_with([np.nan, np.nan])))
    assert (judged["ours"], judged["interval"], judged["outcome"], judged["seeds"]) == (None, None, "undecided", 0)
    assert ": not measured, rule > 1: undecided" in claims.sentence(judged)


KINDS = (*statistics.AUTHORS_KEYS, "greedy")
METRICS = ("logp_sum", "argmax_logp_sum", "rest_logp_sum", "a_norm_mean", "residual_norm_mean", "rep4")


def one_training() -> pd.DataFrame:
    """What a training of one's own measures: one run, no settings that vary."""
    random = np.random.default_rng(0)
    names = [(prompt, kind, metric) for prompt in ("train/0", "test/0") for kind in KINDS for metric in METRICS]
    return store.long((step, step, *name, random.uniform(1, 2)) for step in range(21) for name in names).assign(seed=0)


@pytest.mark.parametrize("column", ["response_type", "metric", "prompt_id"])
def test_what_a_training_lacks_is_not_measured_and_no_error(column):
    whole = one_training()
    tables = [whole, *(whole[whole[column] != name] for name in whole[column].unique())]
    wanted = [part for chapter in ("03_sft", "05_dpo") for claim in claims.of_chapter(chapter) if "sweep" not in claim
              for part in claims.parts(claim) if part["chapter"] == chapter]  # fmt: skip
    outcomes = [{claims.judge(part, [table])["ours"] is None for table in tables} for part in wanted]
    assert {True} in outcomes and {True, False} in outcomes


def test_sign_delta_is_measured_in_a_table_of_plain_texts_too():
    plain = one_training().astype({"response_type": str, "metric": str, "prompt_id": str})
    measured = {"chapter": "05_dpo", "statistic": "sign_delta_of_chosen", "holds": "> 0", "says": "SignDelta"}
    whole = one_training()
    assert claims.judge(measured, [plain])["ours"] == claims.judge(measured, [whole])["ours"] is not None


def test_greedy_answers_which_have_no_peakiness_do_not_hide_sign_delta():
    table = one_training()
    table = table[(table.response_type != "greedy") | (table.metric != "a_norm_mean")]
    assert np.isfinite(statistics.sign_delta(table, "chosen")["chosen"])


def test_a_mistake_in_a_statistic_is_an_error_and_not_called_unmeasured(monkeypatch):
    for mistake, error in ((lambda table: table.vlaue, AttributeError), (lambda table: table["vlaue"], KeyError)):
        monkeypatch.setattr(statistics, "mistaken", mistake, raising=False)
        with pytest.raises(error):
            claims.judge(part("> 0", statistic="mistaken"), [one_training()])
        with pytest.raises(error):
            report._judged(part("> 0", statistic="mistaken"), [one_training()])


def test_interval_is_the_t_interval_of_the_mean():
    _, low, high = statistics.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)


@pytest.mark.parametrize("rule", ["above 0", "> x", "in (0, 1)"])
def test_a_rule_that_cannot_be_read_is_refused(rule):
    with pytest.raises(InputError, match="is not '> x'"):
        claims.judge(part(rule), claims.by_seed(runs_with([1.0, 2.0])))


def test_a_claim_without_records_is_not_attempted_and_says_what_to_run():
    entry = claims.verdicts({})[0]
    assert entry["verdict"] == "not attempted" and entry["reason"].startswith("no record: python -m lddyn run 01_mnist")


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["holds", "holds"], "replicated"),
        (["holds", "undecided"], "partly"),
        (["holds", "fails"], "partly"),
        (["fails", "undecided"], "contradicted"),
        (["undecided", "undecided"], "undecided"),
        (["mixed", "fails"], "partly"),
        ([], "not attempted"),
    ],
)
def test_a_claim_is_contradicted_only_where_a_part_fails(outcomes, verdict):
    assert claims.word(outcomes) == verdict


def test_an_identity_is_a_claim_of_which_every_part_is_exact():
    graded = [claims.grade(entry, "laptop") for entry in claims.ledger()]
    assert [entry["id"] for entry, found in zip(claims.ledger(), graded, strict=True) if found == "identity"] == [
        2, 3, 4, 5, 6, 7, 8, 9, 50, 60,
    ]  # fmt: skip
    assert claims.grade(claims.ledger()[19], "pretrained") == "real model"


def test_json_has_the_promised_fields(capsys):
    assert main(["claims", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    promised = {"grade", "id", "claim", "source", "paper", "ours", "interval", "seeds", "scale", "verdict", "reason"}
    assert len(claims.of_group(entries)) == 49 and all(promised <= entry.keys() for entry in entries)
    assert {entry["verdict"] for entry in entries} <= set(claims.VERDICTS)


def test_every_claim_points_to_a_section_that_is_there():
    for entry in claims.ledger():
        if entry.get("see"):
            cells = json.loads((store.ROOT / "notebooks" / f"{entry['chapter']}.ipynb").read_text())["cells"]
            headings = [
                line.lstrip("# ") for c in cells for line in "".join(c["source"]).splitlines() if line[:1] == "#"
            ]
            assert entry["see"] in headings, f"claim {entry['id']}: {entry['chapter']} has no section {entry['see']!r}"


def test_a_claim_may_be_judged_by_a_recorded_sweep(monkeypatch):
    cells = [pd.DataFrame({"sft_chosen_change": [3.0 + seed / 10, 5.0]}) for seed in range(3)]
    entry = {"id": 1, "claim": "c", "source": "s", "paper": "p", "chapter": "03_sft", "sweep": "trends"}
    entry["parts"] = [{"statistic": "everywhere", "arguments": {"column": "sft_chosen_change"}, "holds": "> 1"}]
    entry["parts"][0]["says"] = "smallest"
    monkeypatch.setattr(claims, "ledger", lambda: [entry])
    monkeypatch.setattr(claims, "of_sweep", lambda name: cells)
    (found,) = claims.verdicts({})
    assert (found["verdict"], found["seeds"], found["scale"]) == ("replicated", 3, "recorded")
    assert found["ours"] == pytest.approx(3.1)
    monkeypatch.setattr(claims, "of_sweep", lambda name: [])
    (found,) = claims.verdicts({})
    assert found["verdict"] == "not attempted" and found["reason"].endswith("lddyn sweep book/sweeps/trends.yml")


def test_a_part_may_be_measured_in_another_chapter_and_the_scorecard_joins_them(monkeypatch):
    two = {"id": 1, "claim": "c", "source": "s", "paper": "p", "chapter": "01_mnist"}
    elsewhere = {"chapter": "02_decomposition", "statistic": "largest", "arguments": {"metric": "lbk_share"}}
    two["parts"] = [part("< 1"), part("> 1") | elsewhere]
    monkeypatch.setattr(claims, "ledger", lambda: [two])
    one = {"scale": "smoke", "runs": runs_with([0.1, 0.1, 0.1])}
    other = one | {"runs": [r._replace(table=r.table.assign(metric="lbk_share")) for r in one["runs"]]}
    (alone,) = claims.verdicts({"02_decomposition": other})
    assert alone["verdict"] == "contradicted" and "no record: python -m lddyn run 01_mnist" in alone["reason"]
    (both,) = claims.verdicts({"01_mnist": one, "02_decomposition": other})
    assert both["verdict"] == "partly" and [p["chapter"] for p in both["parts"]] == ["01_mnist", "02_decomposition"]


def test_a_chapter_that_measures_a_part_of_a_claim_says_that_it_is_its_part(monkeypatch):
    entry = {"id": 1, "claim": "c", "source": "s", "paper": "p", "chapter": "01_mnist"}
    monkeypatch.setattr(claims, "ledger", lambda: [entry | {"parts": [part("< 1"), part("< 1", chapter="03_sft")]}])
    (judged,) = claims.verdicts({"01_mnist": {"scale": "laptop", "runs": runs_with([0.1, 0.2])}})
    assert judged["elsewhere"] == ["03_sft"] and "this chapter’s part: replicated" in claims.as_html([judged])
    assert "this chapter’s part" not in claims.as_html([judged | {"elsewhere": []}])


def _rules(text):
    """The rules of a ledger, without what they are called: (chapter, statistic, arguments, rule)."""
    parts = [part for claim in yaml.safe_load(text) for part in claims.parts(claim)]
    return {(p["chapter"], p["statistic"], str(p.get("arguments", {})), p["holds"]): p for p in parts}


@pytest.mark.parametrize("chapter", recorded.JUDGED)
def test_a_rule_is_older_than_the_recorded_runs_that_it_judges_or_says_why_not(chapter):
    """Otherwise it can be fitted to them."""
    now = _rules(claims.LEDGER.read_text())
    for commit in {run.manifest["git"]["commit"] for run in recorded.read(chapter, *recorded.JUDGED[chapter])}:
        done = subprocess.run(
            ["git", "show", f"{commit}:book/claims.yml"], capture_output=True, text=True, cwd=store.ROOT
        )
        if done.returncode:
            pytest.skip(f"the history of this clone does not reach to {commit}")
        then = _rules(done.stdout)
        younger = [
            rule for rule, part in now.items() if rule[0] == chapter and rule not in then and "later" not in part
        ]
        assert not younger, f"younger than the runs of {commit}"


@pytest.mark.parametrize(("value", "rule"), [(0.0, "> 0"), (0.0, "< 0")])
def test_a_bound_does_not_satisfy_its_own_rule(value, rule):
    assert claims.judge(part(rule, exact=True), claims.by_seed(runs_with([value])))["outcome"] == "fails"
