"""The authors' logs: every style of their files is read, appended runs are told apart, and a rule judges runs."""

import json

import numpy as np
import pandas as pd
import pytest

from lddyn import InputError
from lddyn.__main__ import main
from lddyn.chapters import claims
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import released as judged
from lddyn.engine import store
from lddyn.workshop import released, released_files

SHARED = store.ROOT.parent / "shared" / "data" / "authors" / "released_logs.parquet"
THEIRS = [(names or (kind,))[0] for kind, names in RESPONSE_TYPES.items()]


def entry(step, style, split="train", **more):
    """One evaluation in a style of the authors' files; log pi of every type falls by one each time."""
    values = {f"logps_eval_prob_{split}/{name}": -100.0 - step for name in THEIRS} | more
    if style == "first":
        return values | {"logps_eval_prob_train/chosen_selfr": -300.0, "logps_eval/chosen": -100.0, "loss/eval": 100.0}
    if style == "other path":
        return values | {"argmax_prob_logits": -50.0, "except_argmax_prob_logits": float("nan"), "A_o": 230.0}
    return values | {"argmax_prob_logits": -50.0 + step, "chosen_A_o": 250.0, "p_e": 0.7}


def write(folder, run, style, join="\n", split="train", count=12):
    file = folder / "exp_results" / run / f"prob_{split}_metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(join.join(json.dumps(entry(step, style, split)) for step in range(count)) + join)
    return file


def test_all_styles_of_files_are_read_and_y_star_only_where_it_was_measured_on_its_own_path(tmp_path):
    write(tmp_path, "pythia14_20240416", "first", join="")
    write(tmp_path, "pythia410m_20240416", "first", join="", split="test")
    write(tmp_path, "dpo_pythia410m_sft0_observeargmax", "other path")
    write(tmp_path, "qwen05_baseline_dpo_checkbug_5e7", "new")
    table, left_out = released_files.read(tmp_path)
    assert not left_out and list(table.columns) == released_files.COLUMNS
    assert table.groupby("run").step.nunique().eq(12).all()
    kinds = table.groupby("run").response_type.agg(set)
    assert all(found == set(RESPONSE_TYPES) for found in kinds)
    assert set(table[table.metric == "argmax_logp_sum"].run) == {"qwen05_baseline_dpo_checkbug_5e7"}
    assert set(table[table.split == "test"].run) == {"pythia410m_20240416"}
    about = table.drop_duplicates("run").set_index("run")[["model", "size", "kind"]]
    assert tuple(about.loc["pythia14_20240416"]) == ("Pythia-1.4B", 1.4, "sft")
    assert tuple(about.loc["qwen05_baseline_dpo_checkbug_5e7"]) == ("Qwen1.5-0.5B", 0.5, "dpo")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("pythia14_supreject_20240419", ("Pythia-1.4B", "sft_on_rejected")),
        ("extend_sft_qwen18_observe", ("Qwen1.5-1.8B", "extend_sft")),
        ("extend_dpo_qwen18_ep6", ("Qwen1.5-1.8B", "extend_dpo")),
        ("base_dpo_qwen_ep6", ("Qwen1.5-1.8B", "dpo")),
        ("dpo_pythia1b_sft1000", ("Pythia-1B", "dpo")),
        ("sparse_dpo_qwen18_ep6", ("Qwen1.5-1.8B", "sparse_dpo")),
        ("ultrafb_dpo_pythia410m", None),
        ("entmax_dpo_qwen18_ep6", None),
        ("test", None),
    ],
)
def test_a_name_with_an_unknown_word_is_not_taken_for_a_run_that_is_known(run, said):
    assert released_files.named(run) == said


def test_what_is_left_out_of_a_clone_is_named(tmp_path):
    write(tmp_path, "sft_pythia28_ep6", "new")
    write(tmp_path, "sft_pythia14_ep6", "new", count=3)
    write(tmp_path, "entmax_dpo_qwen18_ep6", "new")
    table, left_out = released_files.read(tmp_path)
    assert set(table.run) == {"sft_pythia28_ep6"}
    assert len(left_out) == 2 and "fewer than 10 evaluations" in left_out[1] and "entmax" in left_out[0]


def test_a_clone_gives_repository_and_commit(tmp_path, monkeypatch):
    import subprocess

    write(tmp_path, "sft_pythia28_ep6", "new")
    for words in (
        ["init", "-q"],
        ["remote", "add", "origin", "https://github.com/some/clone.git"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "logs"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    table, _ = released_files.read(tmp_path)
    assert set(table.repository) == {"some/clone"} and len(table.commit[0]) == 40


BAD = {
    "cut off": ('{"logps_eval_prob_train/chosen": -1.0}{"logps', "one an evaluation"),
    "a list": ("[1, 2]", "is no object"),
    "another log": ('{"loss": 1.0}', "has no logps_eval_prob_train/chosen"),
    "empty": ("\n", "is empty"),
}


@pytest.mark.parametrize("text, told", BAD.values(), ids=BAD)
def test_a_file_that_is_no_log_is_one_line_with_its_name(tmp_path, capsys, text, told):
    write(tmp_path, "sft_pythia28_ep6", "new").write_text(text)
    assert main(["released", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "prob_train_metrics.json" in line and told in line and not (tmp_path / "out.json").exists()


def as_table(**logs):
    """A table of logs as somebody gathers them: name -> (method, split, {type: values})."""
    rows = [
        ("some/repository", name, "Pythia-410M", method, split, step, kind, value)
        for name, (method, split, curves) in logs.items()
        for kind, values in curves.items()
        for step, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=released_files.IN_TABLE)


def saved(path, table):
    table.to_parquet(path)
    return path


def test_a_table_that_is_not_as_it_should_be_is_one_line_with_its_name(tmp_path):
    good = as_table(sft=("sft", "train", {"chosen": np.arange(12.0)}))
    (tmp_path / "text.parquet").write_text("no table")
    bad = {
        "none.parquet": "cannot read",
        "text.parquet": "cannot read",
        saved(tmp_path / "column.parquet", good.drop(columns="model")).name: "lacks the column model",
        saved(tmp_path / "kind.parquet", good.assign(method="dop")).name: "did you mean 'dpo'",
        saved(tmp_path / "type.parquet", good.assign(response_type="chozen")).name: "did you mean 'chosen'",
        saved(tmp_path / "nan.parquet", good.assign(value=np.nan)).name: "not finite",
        saved(tmp_path / "short.parquet", good.head(5)).name: "at least 10 evaluations",
    }
    for name, told in bad.items():
        with pytest.raises(InputError, match=told) as raised:
            released_files.read(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)
    (tmp_path / "no logs").mkdir()
    with pytest.raises(InputError, match="has no prob_train_metrics"):
        released_files.read(tmp_path / "no logs")


def facts(tmp_path, **logs):
    return released.facts(released_files.read(saved(tmp_path / "logs.parquet", as_table(**logs)))[0])


def both(chosen, rejected):
    return {"chosen": np.array(chosen), "rejected": np.array(rejected)}


UP, DOWN = np.linspace(-100, -80, 21), np.linspace(-90, -130, 21)


def test_a_rule_holds_where_every_run_satisfies_it_and_the_others_are_named(tmp_path):
    rises_then_falls = np.concatenate([np.linspace(-100, -95, 6), np.linspace(-96, -110, 15)])
    content = facts(
        tmp_path,
        sft=("sft", "train", both(UP, UP)),
        dpo_one=("dpo", "train", both(rises_then_falls, DOWN)),
        dpo_two=("dpo", "train", both(DOWN - 10, DOWN)),
    )
    ledger = {claim["id"]: claims.of_logs(claim, content) for claim in claims.ledger()}
    assert ledger[20]["verdict"] == "replicated" and ledger[30]["verdict"] == "partly"
    rise, fall = ledger[30]["parts"]
    assert (rise["outcome"], rise["held"], rise["runs"], rise["models_held"]) == ("mixed", 1, 2, 0)
    assert [value["run"] for value in rise["values"] if not value["holds"]] == ["dpo_two"]
    assert fall["outcome"] == "holds" and fall["models_held"] == fall["models"] == 1
    assert "rule > 1: holds in 1 of 2 runs (0 of 1 models)" in judged.sentence(rise)
    assert ledger[31] is None and ledger[49] is None  # rephrases and win rates are in no log here


def test_logs_of_test_prompts_and_of_other_trainings_do_not_count(tmp_path):
    falls = both(UP[::-1], UP[::-1])
    content = facts(
        tmp_path,
        sft=("sft", "train", both(UP, UP)),
        of_test=("sft", "test", falls),
        rejected=("sft_on_rejected", "train", falls),
    )
    (part, _) = claims.of_logs(claims.ledger()[19], content)["parts"]
    assert part["runs"] == 1 and len(content["runs"]) == 3


def test_of_runs_appended_to_one_file_the_longest_counts(tmp_path):
    again = np.concatenate([UP[:1], UP[:1], UP, UP[:12]])
    (run,) = facts(tmp_path, sft=("sft", "train", both(again, again)))["runs"]
    assert (run["evaluations"], run["dropped"], run["changes"]["chosen"]) == (21, 14, 20.0)


def test_sft_at_the_beginning_of_a_log_of_dpo_is_no_rise_of_chosen_in_dpo(tmp_path):
    first = np.linspace(-100, -80, 41)  # 1,000 steps of 4 examples, evaluated every 100 examples
    chosen = np.concatenate([first, np.linspace(-81, -100, 60)])
    rejected = np.concatenate([first * 1.5, np.linspace(-121, -200, 60)])
    content = facts(tmp_path, dpo_pythia410m_sft1000=("dpo", "train", both(chosen, rejected)))
    dpo, sft = content["runs"]
    assert (dpo["before"], dpo["start"], dpo["values"]["05_dpo: chosen_rise()"]) == ("SFT on rejected", 20.0, 0.0)
    assert (sft["kind"], sft["evaluations"], dpo["evaluations"]) == ("sft_on_rejected", 41, 61)


def test_what_a_log_starts_from_is_told_by_its_values(tmp_path):
    runs = facts(
        tmp_path,
        sft=("sft", "train", both(UP, UP)),
        base=("dpo", "train", both(UP, DOWN)),
        short=("dpo", "train", both(UP[:15], DOWN[:15])),
        after=("dpo", "train", both(UP + 20, DOWN)),
        wrong=("dpo", "train", both(UP + 20, DOWN + 40)),
    )["runs"]
    found = {run["run"]: (run["before"], run["begins"]) for run in runs}
    assert found == {
        "sft": ("nothing", None), "base": ("nothing", None), "short": ("nothing", "base"), "after": ("SFT", None),
        "wrong": ("SFT on rejected", None),
    }  # fmt: skip


def test_extended_and_baseline_are_compared_at_equal_exposures(tmp_path):
    sft = np.concatenate([UP, np.linspace(-79, -60, 20)])  # at half of it as far as extended at the end
    content = facts(
        tmp_path,
        sft=("sft", "train", both(sft, sft)),
        extended_sft=("extend_sft", "train", both(np.linspace(-100, -80, 41), np.linspace(-100, -70, 41))),
        base=("dpo", "train", both(np.linspace(-60, -90, 30), np.linspace(-60, -160, 30))),
        extended=("extend_dpo", "train", both(np.linspace(-80, -90, 30), np.linspace(-70, -160, 30))),
    )
    (found,) = [entry for entry in content["comparisons"] if entry["kind"] == "extended"]
    assert found["values"]["07_extend: sft_rise_share(kind=chosen)"] == pytest.approx(1.0)
    assert found["values"]["07_extend: sft_rejected()"] == pytest.approx(10.0)
    assert found["values"]["07_extend: falls_less(kind=chosen)"] == pytest.approx(20.0)


def test_a_larger_rate_and_more_sft_are_compared_up_to_the_last_common_evaluation(tmp_path):
    content = facts(
        tmp_path,
        sft=("sft", "train", both(UP, UP)),
        dpo=("dpo", "train", both(UP[0] - 3.0 * np.arange(12), DOWN[:12])),
        dpo_5e7=("dpo", "train", both(UP[0] - 1.0 * np.arange(20), DOWN[:20])),
        after=("dpo", "train", both(UP[10] - 2.0 * np.arange(15), DOWN[:15])),
    )
    found = {entry["kind"]: entry for entry in content["comparisons"]}
    assert found["larger rate"]["values"] == {"05_dpo: rate_effect()": -22.0}
    assert found["more SFT"]["values"] == {"05_dpo: sft_effect(kinds=[chosen])": -14.0}
    assert found["more SFT"]["run"] == "dpo_5e7 / after"


def test_values_of_the_recorded_logs_are_those_that_the_ledger_asks_for():
    content = judged.recorded()
    asked = {judged.key(part) for claim in claims.ledger() for part in claims.parts(claim)}
    told = {name for entry in [*content["runs"], *content["comparisons"]] for name in entry["values"]}
    assert told and not told - asked, "a statistic was renamed: say python -m lddyn released PATH"
    assert len({(run["repository"], run["run"], run["split"]) for run in content["runs"]}) == len(content["runs"])
    for run in content["runs"]:
        assert all(len(curve) == len(run["at"]) <= released.POINTS for curve in run["curves"].values())
        assert run["at"][-1] == run["evaluations"] - 1 and run["curves"].keys() == run["changes"].keys()
    assert judged.FILE.stat().st_size < 300_000


@pytest.mark.skipif(not SHARED.exists(), reason="the table of logs stays outside the project")
def test_the_recorded_logs_can_be_made_again():
    table, left_out = released_files.read(SHARED)
    assert not left_out and released.as_json(released.facts(table)) == judged.FILE.read_text()
