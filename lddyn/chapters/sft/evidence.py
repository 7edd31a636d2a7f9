"""Chapter 3: SFT."""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lddyn.chapters.statistics import BELLS, NATURAL, bounded, change, curve, fall, needed, order, rise, sign_delta


@bounded(-1, 1)
def sft_chosen_order(table: pd.DataFrame) -> float:
    """Rank correlation of log pi(chosen) with the step: 1 where it rises throughout."""
    return order(curve(table, "chosen"))


def sft_chosen_change(table: pd.DataFrame) -> float:
    """Change of log pi(chosen) over SFT, nats summed over the response."""
    return change(table, "chosen")


def bell_rise(table: pd.DataFrame) -> float:
    """Smallest rise from the start to the peak among the rejected answer and all rephrases, nats."""
    return min(rise(table, kind) for kind in BELLS)


def bell_fall(table: pd.DataFrame) -> float:
    """Smallest fall from the peak to the end among the rejected answer and all rephrases, nats."""
    return min(fall(table, kind) for kind in BELLS)


@bounded(0, 1)
def other_train_peak(table: pd.DataFrame) -> float:
    """When log pi of answers to other training questions peaks, as a share of the steps."""
    values = curve(table, "other_train")
    return float(values.idxmax() / values.index[-1])


def other_train_over_other_test(table: pd.DataFrame) -> float:
    """Largest rise of answers to other training questions minus that of unseen answers, nats."""
    return rise(table, "other_train") - rise(table, "other_test")


def reuse_gap(table: pd.DataFrame, split: str = "train") -> float:
    """End change of answers to other training questions minus that of unseen answers, nats.

    After the prompts of one `split`, trained on (`train`) or not (`test`).
    """
    return change(table, "other_train", split=split) - change(table, "other_test", split=split)


@bounded(-1, 1)
def split_agreement(table: pd.DataFrame) -> float:
    """Rank correlation of the end changes of all kinds between prompts that are trained on and that are not.

    Without `chosen`, which is one thing after its own prompt and another after one that was never trained on.
    """
    ends = [[change(table, kind, split=split) for kind in NATURAL[1:]] for split in ("train", "test")]
    return float(spearmanr(*ends).statistic)


@bounded(-1, 1)
def generated_reuse(table: pd.DataFrame) -> float:
    """Change over SFT of the share of greedy 4-grams found in training answers to other questions, less the control's.

    The control is the share found in as many answers that were never trained on; both splits of prompts.
    """
    rows = table[table.response_type == "greedy"]
    share = rows.pivot_table(index="step", columns="metric", values="value", observed=True)
    share = needed(share, "prob_reuse_train", "prob_reuse_control")
    change = share.iloc[-1] - share.iloc[0]
    return float(change["prob_reuse_train"] - change["prob_reuse_control"])


def unrelated_change(table: pd.DataFrame) -> float:
    """Change of log pi of unrelated human sentences over SFT, nats."""
    return change(table, "unrelated")


def shuffled_change(table: pd.DataFrame) -> float:
    """Larger of the changes of log pi of the two shuffled types over SFT, nats."""
    return max(change(table, kind) for kind in ("chosen_shuffled", "test_shuffled"))


@bounded(-1, 1)
def format_like_semantic(table: pd.DataFrame) -> float:
    """Correlation over steps of the curves of the two rephrases of chosen, first tenth of training."""
    semantic, form = curve(table, "chosen_semantic"), curve(table, "chosen_format")
    early = semantic.index <= semantic.index[-1] / 10
    return float(np.corrcoef(semantic[early], form[early])[0, 1])


def format_minus_semantic(table: pd.DataFrame, kind: str = "chosen_format") -> float:
    """End change of the format-keeping rephrase minus that of the meaning-keeping one, nats.

    `kind`: `chosen_format`, or `chosen_plausible`, which keeps to the subject.
    """
    return change(table, kind) - change(table, "chosen_semantic")


def format_minus_semantic_share(table: pd.DataFrame, kind: str = "chosen_format") -> float:
    """The same as a share of what the trained answer gains."""
    return format_minus_semantic(table, kind) / change(table, "chosen")


def heat_map(table: pd.DataFrame) -> pd.DataFrame:
    """The last panel of figure 3: SignDelta of every observed type (rows) for every trained type (columns).

    Each column is divided by its range. Uses the runs on the probed prompts only (`n_train` equal to the probes).
    """
    used = ("logp_sum", "a_norm_mean", "residual_norm_mean")
    needed(table, "n_train", "target")
    small = table[(table.n_train == table.n_train.min()) & table.metric.isin(used)]
    whole = pd.DataFrame({target: sign_delta(part, target) for target, part in small.groupby("target", sort=False)})
    return whole / (whole.max() - whole.min())


def answers_to_new_prompts(answers: pd.DataFrame, count: int = 4) -> pd.DataFrame:
    """The first greedy answers after finetuning to questions that were never trained on (`run.read_answers`)."""
    after = answers[(answers.step > 0) & answers.prompt_id.str.startswith("test/")].head(count)
    questions = after.prompt.str.removesuffix("\nAnswer:")
    return pd.DataFrame({"new prompt": questions, "greedy answer after finetuning": after.text})


def fingerprint(table: pd.DataFrame) -> float:
    """Trained on one answer's rephrase, the SignDelta of the other answer's rephrase minus that of the other answer."""
    cells = needed(heat_map(table), "chosen_semantic", "rejected_semantic")
    return float(
        np.mean(
            [
                cells.loc["rejected_semantic", "chosen_semantic"] - cells.loc["rejected", "chosen_semantic"],
                cells.loc["chosen_semantic", "rejected_semantic"] - cells.loc["chosen", "rejected_semantic"],
            ]
        )
    )


@bounded(0, 1)
def heat_map_diagonal(table: pd.DataFrame) -> float:
    """Share of the trained types that are themselves their column's maximum."""
    cells = heat_map(table)
    return float(np.mean([cells[target].idxmax() == target for target in cells]))


def shuffled_raises_others(table: pd.DataFrame) -> float:
    """Number of other types with a positive SignDelta when shuffled words are trained."""
    column = needed(heat_map(table), "test_shuffled")["test_shuffled"].drop("test_shuffled")
    return float((column > 0).sum())


# --- sweeps: what holds in all cells of a recorded table


def everywhere(cells: pd.DataFrame, column: str, end: str = "min", size: str | None = None) -> float:
    """The smallest (`min`) or largest (`max`) value over all cells, or those of one size of the model, of a statistic
    of single runs, a column of a sweep.

    cells: one seed's rows.
    """
    return float(cells[cells["size"] == size if size else slice(None)][column].agg(end))
