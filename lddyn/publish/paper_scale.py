"""The page on the authors' released logs: figures, tables and sentences, all made of `book/recorded/released.json`."""

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from lddyn.chapters import claims, statistics
from lddyn.chapters.dpo import evidence as dpo
from lddyn.chapters.style import GREEN, GREY, MARKS, ORANGE, PANELS, PURPLE, RED, STYLES
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import released, store

TOP = "y*"
CHAPTERS = {"sft": "03_sft", "dpo": "05_dpo"}
Run = Mapping


def runs(*kinds: str, split: str = "train") -> list[Run]:
    """The recorded logs of these kinds, smaller models first."""
    return [run for run in released.recorded()["runs"] if run["kind"] in kinds and run["split"] == split]


def span(values: Iterable[float], style: str = "+.1f") -> str:
    """The smallest and the largest of some numbers, `+1.0 to +2.5`; one where they look alike."""
    numbers = list(values)
    low, high = (format(end, style) for end in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def list_of(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- figures -----------------------------------------------------------------------------------------------------


def longest(logs: Iterable[Run]) -> list[Run]:
    """Of each model, kind, repository's owner and what was trained before, the log with all types that is longest."""
    found: dict[tuple, Run] = {}
    for run in logs:
        name = (run["model"], run["kind"], run["before"], run["repository"].split("/")[0])
        if "rejected" in run["curves"] and (name not in found or run["evaluations"] > found[name]["evaluations"]):
            found[name] = run
    return list(found.values())


def _title(run: Run) -> str:
    after = "base model" if run["before"] == "nothing" else f"after {run['before']}"
    loss = ", sparse" if run["kind"] == "sparse_dpo" else ""
    return f"{run['model']}\n{after}{loss}\n{run['repository'].split('/')[0]}"


def multiples(logs: Sequence[Run]) -> Figure:
    """Small multiples: a column a log, a row a family of responses; changes of log pi, nats, over the log's length."""
    fig, axes = plt.subplots(
        len(PANELS), len(logs), figsize=(1.25 * len(logs) + 1.5, 8), sharex=True, sharey="row", squeeze=False
    )
    for column, run in zip(axes.T, logs, strict=True):
        for ax, (panel, kinds) in zip(column, PANELS.items(), strict=True):
            ax.set_label(f"{_title(run)}: {panel}")
            for kind in kinds:
                color, line = STYLES[kind]
                share = np.array(run["at"]) / run["at"][-1]
                look = {"color": color, "linestyle": line, "linewidth": 1.4}
                marks = {"marker": MARKS[color], "markersize": 2.5, "markevery": 3}
                ax.plot(share, run["curves"][kind], label=kind, **look, **marks)
            ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        column[0].set_title(_title(run), fontsize=7)
        column[0].set_xticks([0, 0.5, 1])
        column[-1].set_xlabel("share of the log", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("change (nats)", fontsize=8)
        ax.legend(fontsize=6)
    return fig


def top(logs: Sequence[Run]) -> Figure:
    """log pi(y*) along the chosen answers wherever it was measured on its own path, change in nats."""
    colors = {"sft": GREY, "extend_sft": PURPLE, "dpo": GREEN, "extend_dpo": ORANGE, "sparse_dpo": RED}
    fig, ax = plt.subplots(figsize=(7, 4))
    for n, run in enumerate(logs):
        line, mark = "-" if run["model"].startswith("Pythia") else "--", "osDX^vP*h"[n % 9]
        share, name = np.array(run["at"]) / run["at"][-1], f"{run['model']}, {run['run']}"
        look = {"color": colors[run["kind"]], "linestyle": line, "marker": mark, "markersize": 3.5, "linewidth": 1.4}
        ax.plot(share, run["curves"][TOP], label=name, **look)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="share of the log", ylabel="change of log π(y*) (nats)")
    ax.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return fig


# --- end changes beside ours -------------------------------------------------------------------------------------


def ours(tables: Mapping[str, Mapping], method: str) -> dict[str, pd.Series]:
    """End changes of the companion's own runs of a method, nats, mean over seeds: name of the model -> types.

    tables: name of the model -> chapter -> its runs in one table (`store.frame`).
    """
    found = {}
    for name, of in tables.items():
        if CHAPTERS[method] in of:
            seeds = [rows for _, rows in dpo.baseline(of[CHAPTERS[method]]).groupby("seed")]
            kinds = [kind for kind in RESPONSE_TYPES if len(statistics.mean_over_prompts(seeds[0], kind))]
            found[name] = pd.Series({k: np.mean([statistics.change(seed, k) for seed in seeds]) for k in kinds})
    return found


def agreement(mine: pd.Series, theirs: Mapping[str, float]) -> tuple[float, int, int]:
    """Rank correlation of the end changes of all types that both have, how many have the same sign, and of how many."""
    both = [kind for kind in mine.index if kind in theirs]
    values = np.array([theirs[kind] for kind in both])
    if len(both) < 3:
        return math.nan, 0, len(both)
    return float(spearmanr(mine[both], values).statistic), int((mine[both] * values > 0).sum()), len(both)


def end_changes(logs: Sequence[Run], mine: Mapping[str, pd.Series]) -> pd.DataFrame:
    """End changes of all types, a row a log after those of the companion's own models; dose and agreement with these.

    The dose is the growth of log pi(chosen) - log pi(rejected).
    """
    lines = {
        (name, "this companion"): {"before": "", "dose": f"{own.chosen - own.rejected:.0f}"}
        | {kind: f"{own[kind]:+.1f}" for kind in own.index}
        for name, own in mine.items()
    }
    for run in logs:
        dose = "" if run["margin"] is None else f"{run['margin']:.0f}"
        line = {"before": run["before"], "dose": dose}
        line |= {kind: f"{value:+.1f}" for kind, value in run["changes"].items() if kind != TOP}
        for name, own in mine.items():
            rho, signs, of = agreement(own, run["changes"])
            line |= {f"rank, {name}": "" if math.isnan(rho) else f"{rho:.2f}", f"signs, {name}": f"{signs}/{of}"}
        owner = run["repository"].split("/")[0]
        lines[run["model"], f"{run['run']} ({owner})"] = line
    order = ["before", "dose", *RESPONSE_TYPES, *(f"{what}, {name}" for name in mine for what in ("rank", "signs"))]
    cells = [[*names, *(line.get(column, "") for column in order)] for names, line in lines.items()]
    return pd.DataFrame(cells, columns=["model", "run", *order])


def agreement_sentence(logs: Sequence[Run], mine: Mapping[str, pd.Series]) -> str:
    """In how far the order and the signs of the end changes are those of the companion's own runs; Markdown."""
    if not mine:
        return "No chapter of this companion has published runs to compare with."
    sentences = []
    for name, own in mine.items():
        found = [agreement(own, run["changes"]) for run in logs if run["margin"] is not None]
        ranks, signs = [rho for rho, _, _ in found], [same / of for _, same, of in found]
        lead = f"Beside {name} (dose {own.chosen - own.rejected:.0f} nats)"
        sentences.append(
            f"{lead} the rank correlation over types is {span(ranks, '.2f')} and the signs agree in "
            f"{span(signs, '.0%')} of the types."
        )
    return " ".join(sentences)


# --- sentences and tables of the logs alone ----------------------------------------------------------------------


def what_there_is() -> str:
    """How many logs of how many models, and what was trained."""
    logs = released.recorded()["runs"]
    models = {run["model"]: run["size"] for run in logs}
    kinds = {kind: sum(run["kind"] == kind for run in logs) for kind in dict.fromkeys(run["kind"] for run in logs)}
    sizes = f"{min(models.values()):g} to {max(models.values()):g} billion parameters"
    trained = list_of([f"{number} of `{kind}`" for kind, number in kinds.items()])
    begun = [run["run"] for run in logs if run["begins"]]
    return (
        f"{len(logs)} logs of {len(models)} models ({list_of(sorted(models))}; {sizes}): {trained}. "
        f"{counted(len(begun), 'log')} of them {'is' if len(begun) == 1 else 'are'} the beginning of another one, "
        f"stopped earlier ({list_of([f'`{name}`' for name in begun])}): they are no further evidence, and show how "
        "much a verdict depends on when one stops."
    )


def reading_sentence() -> str:
    """What was told from the values while the logs were read: appended runs, SFT in a log of DPO, SFT on rejected."""
    logs, said = released.recorded()["runs"], []
    if appended := [run for run in logs if run["dropped"] and not run["run"].endswith(": SFT")]:
        names = list_of([f"`{run['run']}` ({counted(run['dropped'], 'evaluation')} left out)" for run in appended])
        said.append(f"Several runs were appended to one file, of which the longest counts, in {names}.")
    for run in (run for run in logs if run["run"].endswith(": SFT")):
        said.append(
            f"`{run['run'].removesuffix(': SFT')}` begins with {run['evaluations'] - 1} evaluations of SFT, in which "
            f"chosen gains {run['changes']['chosen']:+.1f} nats and rejected {run['changes']['rejected']:+.1f}: a rise "
            "that is not one of DPO."
        )
        said += [
            f"The same numbers are those of `{other['run']}`, so that the rejected answers were trained."
            for other in logs
            if other["begins"] == run["run"] and run["kind"] == "sft_on_rejected"
        ]
    if wrong := [run for run in logs if run["before"] == "SFT on rejected"]:
        names = list_of([f"`{run['run']}`" for run in wrong])
        said.append(
            f"DPO started from a model that was trained on the *rejected* answers, by what it has gained on either, in "
            f"{names}; such a start tells nothing on more SFT before DPO (claim 37)."
        )
    return " ".join(said)


def sft_sentence() -> str:
    """Whether chosen rises throughout SFT, and by how much answers to other training questions lead."""
    order = [run["values"]["03_sft: sft_chosen_order()"] for run in runs("sft")]
    gaps = [run["values"][name] for run in runs("sft") if (name := "03_sft: reuse_gap()") in run["values"]]
    return (
        f"In SFT the rank correlation of log π(chosen) with the step is {span(order, '.2f')} in "
        f"{counted(len(order), 'log')}. At the end answers to other training questions have gained "
        f"{span(gaps, '.0f')} nats more than unseen ones ({counted(len(gaps), 'log')})."
    )


def controls() -> pd.DataFrame:
    """Gain of answers to other questions minus that of unseen ones, where they were trained on and where they were not.

    Two controls: after test prompts `other_train` holds answers to other test prompts; and SFT on rejected answers.
    """
    what = {
        ("sft", "train"): "trained answers, training prompts",
        ("sft", "test"): "control: answers that nobody trained on, test prompts",
        ("sft_on_rejected", "train"): "control: SFT on rejected answers, training prompts",
        ("sft_on_rejected", "test"): "control: SFT on rejected answers, test prompts",
    }
    rows = []
    for (kind, split), words in what.items():
        for run in runs(kind, split=split):
            name = f"03_sft: reuse_gap({'split=test' if split == 'test' else ''})"
            if name in run["values"]:
                changes = [f"{run['changes'][of]:+.1f}" for of in ("other_train", "other_test")]
                gap = f"{run['values'][name]:+.1f}"
                rows.append((words, run["model"], run["run"], *changes, gap))
    columns = ["other_train is", "model", "run", "other_train", "other_test", "difference"]
    return pd.DataFrame(rows, columns=columns)


def controls_sentence() -> str:
    """The range of the difference of `controls` in each group."""
    groups = controls().groupby("other_train is", sort=False).difference
    told = [f"{span(map(float, values))} nats ({words})" for words, values in groups]
    return "The difference is " + "; ".join(told) + "."


def starts() -> pd.DataFrame:
    """Every log of DPO: what it starts from, how far chosen rises and falls, and y*."""
    rows = []
    for run in runs("dpo"):
        values, y = run["values"], run["changes"].get(TOP)
        rise, fall = (f"{values[f'05_dpo: chosen_{way}()']:.1f}" for way in ("rise", "fall"))
        before = run["before"] if run["before"] == "nothing" else f"{run['before']} ({run['start']:+.0f} nats)"
        dose = "" if run["margin"] is None else f"{run['margin']:.0f}"
        rows.append((run["model"], run["run"], before, dose, rise, fall, "" if y is None else f"{y:+.1f}"))
    columns = ["model", "run", "trained before", "dose", "chosen rises by", "then falls by", "y*"]
    return pd.DataFrame(rows, columns=columns)


def starts_sentence() -> str:
    """How far chosen rises at first, by what was trained before; the run at a larger learning rate by itself."""
    faster = {name for name, _ in _larger_rate()}
    told = []
    for before in dict.fromkeys(run["before"] for run in runs("dpo")):
        logs = [run for run in runs("dpo") if run["before"] == before and run["run"] not in faster]
        rises = [run["values"]["05_dpo: chosen_rise()"] for run in logs]
        from_what = "from the untouched model" if before == "nothing" else f"after {before}"
        told.append(f"by {span(rises, '.1f')} nats {from_what} ({counted(len(rises), 'log')})")
    words = f"In DPO chosen first rises {list_of(told)}."
    for name, values in _larger_rate():
        words += (
            f" At a larger learning rate (`{name}`) it ends {-values['05_dpo: rate_effect()']:.0f} nats lower than at "
            f"5e-7, and y* {-values['05_dpo: rate_effect(metric=argmax_logp_sum)']:.0f} nats lower."
        )
    return words


def _larger_rate() -> list[tuple[str, Mapping[str, float]]]:
    entries = [entry for entry in released.recorded()["comparisons"] if entry["kind"] == "larger rate"]
    return [(entry["run"].split(" / ")[0], entry["values"]) for entry in entries]


def extended() -> pd.DataFrame:
    """Extended against baseline, nats: a column a copy of the experiment."""
    asked = {
        "rejected at the start of DPO, extended minus baseline": "sft_rejected()",
        "rise of chosen in SFT, extended over baseline": "sft_rise_share(kind=chosen)",
        "chosen in DPO, extended minus baseline": "falls_less(kind=chosen)",
        "the same at equal margin": "falls_less(kind=chosen, at=margin)",
        "others in DPO, smallest difference": "others_fall_less()",
        "the same at equal margin ": "others_fall_less(at=margin)",
        "y* in DPO, extended minus baseline": "falls_less(kind=chosen, metric=argmax_logp_sum)",
    }
    entries = [entry for entry in released.recorded()["comparisons"] if entry["kind"] == "extended"]
    rows = {}
    for words, name in asked.items():
        values = [entry["values"].get(f"07_extend: {name}") for entry in entries]
        rows[words] = ["" if value is None else f"{value:+.2f}" for value in values]
    return pd.DataFrame(rows, index=[f"{entry['model']}: {entry['run']}" for entry in entries]).T


def extended_sentence() -> str:
    """What chosen loses in DPO under extended and under the baseline, in every copy, and what it had gained before."""
    ends, before = [], []
    for run in runs("extend_dpo"):
        owner = run["repository"].split("/")[0]
        near = [r for r in runs("dpo") if r["model"] == run["model"] and r["repository"].startswith(f"{owner}/")]
        for other in (r for r in near if r["before"] == "SFT"):
            mine, theirs = run["changes"]["chosen"], other["changes"]["chosen"]
            ends.append(f"{mine:+.0f} against {theirs:+.0f} ({run['model']}, {owner})")
            before.append(f"{run['start']:+.0f} against {other['start']:+.0f} ({owner})")
    return (
        f"In DPO the chosen answer changes, extended against baseline, by {list_of(ends)} nats. In the SFT before it "
        f"had gained {list_of(before)}: where these differ, so does more than the method. SFT itself is compared at "
        "equal exposures of the chosen answers, where its logs are there."
    )


def verdicts() -> pd.DataFrame:
    """Every part of a claim that a log can tell: the rule, in how many runs and models it holds, and where not."""
    rows = []
    for claim in claims.ledger():
        for part in (claims.of_logs(claim) or {"parts": []})["parts"]:
            numbers = [value["value"] for value in part["values"]]
            fails = [f"{value['run']} ({value['value']:.3g})" for value in part["values"] if not value["holds"]]
            spread = f"{min(numbers):.3g} to {max(numbers):.3g}" if len(numbers) > 1 else f"{numbers[0]:.3g}"
            counts = [f"{part[of]}/{part[all_]}" for of, all_ in (("held", "runs"), ("models_held", "models"))]
            rows.append((claim["id"], part["says"], part["holds"], spread, *counts, ", ".join(fails)))
    return pd.DataFrame(rows, columns=["claim", "part", "rule", "values", "runs", "models", "does not hold in"])


def verdicts_sentence() -> str:
    """Which rules hold in every run, in none, and in some: the first two say what to expect of another model."""
    found: dict[str, list[str]] = {"holds": [], "fails": [], "mixed": []}
    for claim in claims.ledger():
        for part in (claims.of_logs(claim) or {"parts": []})["parts"]:
            found[part["outcome"]].append(str(claim["id"]))
    numbers = {outcome: ", ".join(dict.fromkeys(ids)) or "none" for outcome, ids in found.items()}
    return (
        f"Of {sum(map(len, found.values()))} parts that a log can tell {len(found['holds'])} hold in every run (of "
        f"claims {numbers['holds']}), {len(found['fails'])} in none ({numbers['fails']}) and {len(found['mixed'])} "
        f"in some ({numbers['mixed']})."
    )


def sources() -> pd.DataFrame:
    """Repository and commit of every log."""
    rows = [
        (run["repository"], run["run"], run["split"], run["evaluations"], (run["commit"] or "not known")[:10])
        for run in sorted(released.recorded()["runs"], key=lambda run: (run["repository"], run["run"], run["split"]))
    ]
    return pd.DataFrame(rows, columns=["repository", "run", "prompts", "evaluations", "commit"])


def tables(shown: Mapping[str, Mapping], real: Mapping[str, Mapping]) -> dict[str, dict[str, pd.DataFrame]]:
    """What the companion itself has measured, for `ours`: published chapters, and recorded ones of the real model."""
    named = {"the small model": shown, "SmolLM2-135M": real}
    return {
        name: {chapter: store.frame(of[chapter]["runs"]) for chapter in CHAPTERS.values() if chapter in of}
        for name, of in named.items()
    }
