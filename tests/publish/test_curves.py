"""What the curves of a figure can be switched to: a view must show its own model in its own unit."""

import matplotlib.pyplot as plt
import pytest

from lddyn.chapters import style
from lddyn.chapters.extend import figures as extend
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import recorded, store
from lddyn.publish import curves, paper_scale


def run(seed, end, **parameters):
    """All types of response end `end` nats above their start at -20, over 10 tokens."""
    rows = [
        (step, step, "train/0", kind, metric, (-20 + step / 4 * end) / tokens)
        for step in (0, 4)
        for kind in RESPONSE_TYPES
        for metric, tokens in (("logp_sum", 1), ("logp_mean", 10))
    ]
    return store.Run(None, store.long(rows), {"parameters": {"seed": seed, "epochs": 2} | parameters})


@pytest.fixture(scope="module")
def views():
    trained = {"target": "chosen", "n_train": 64}
    runs = [run(seed, end, **trained) for seed, end in ((0, 3.0), (1, 5.0))]
    runs.append(run(0, 50.0, target="rejected", n_train=8))  # of the heat map
    figure = style.response_curves(store.frame(runs[:2]), 2)
    drawn = style.panels(figure)
    plt.close(figure)
    return drawn, curves.views("fig-03-kinds", drawn, runs)


def found(view, name):
    return next((panel, one) for panel in view["panels"] for one in panel["series"] if one["name"] == name)


def test_the_first_view_is_what_the_figure_draws(views):
    drawn, (first, *_) = views
    assert [panel["series"] for panel in first["panels"]] == [panel["series"] for panel in drawn]
    panel, chosen = found(first, "chosen")
    assert (chosen["x"], chosen["y"], chosen["low"], chosen["high"]) == ([0, 2], [0, 4], [0, 3], [0, 5])
    assert (panel["steps"], panel["seeds"], panel["y"]) == (2, 2, "change of log π (nats)")


def test_per_token_is_the_mean_over_the_tokens_of_the_same_runs(views):
    panel, chosen = found(views[1][1], "chosen")
    assert (views[1][1]["model"], views[1][1]["unit"]) == ("small model", "per token")
    assert chosen["y"] == pytest.approx([0, 0.4]) and panel["y"] == "change of log π (nats per token)"


def test_the_real_model_and_every_released_log_can_be_seen(views):
    units = {}
    for view in views[1]:
        units.setdefault(view["model"], []).append(view["unit"])
    logs = paper_scale.longest(paper_scale.runs("sft"))
    assert list(units)[:2] == ["small model", "SmolLM2-135M"] and len(units) == 2 + len(logs) > 3
    assert {name: given for name, given in units.items() if given != ["sum"]} == {
        name: ["sum", "per token"] for name in ("small model", "SmolLM2-135M")
    }
    view = next(view for view in views[1] if logs[0]["run"] in view["model"])
    panel, chosen = found(view, "chosen")
    assert (panel["x"], panel["seeds"], chosen["x"][-1]) == ("share of the log", 1, 1)
    assert chosen["y"] == pytest.approx(logs[0]["curves"]["chosen"], rel=1e-4)


def test_models_side_by_side_keep_their_own_steps_and_seeds():
    runs = [run(seed, 4.0, target="chosen", n_train=64) for seed in (0, 1)]
    own, real = curves._sft(runs)[:2]
    figure = style.two_scales({"small": (own.table, own.steps[0]), "SmolLM2": (real.table, real.steps[0])})
    drawn = style.panels(figure)
    plt.close(figure)
    for view in curves.views("fig-03-real", drawn, runs):
        seeds = {panel["title"].split(": ")[0]: panel["seeds"] for panel in view["panels"]}
        assert seeds == {"small": 2, "SmolLM2": len(recorded.read("03_sft", "main"))}
        steps = {panel["steps"] for panel in view["panels"]}
        assert steps == {2.0, float(store.steps_per_epoch(recorded.read("03_sft", "main")))}


def test_released_logs_of_sft_and_dpo_are_joined_where_dpo_starts():
    (logs,) = curves._stage_logs()
    figure = extend.two_stages(logs.table, *logs.stages)
    view = curves._view(logs, "sum", style.panels(figure))
    plt.close(figure)
    of_owner = [run for run in paper_scale.runs("extend_sft", "extend_dpo") if run["repository"].startswith("xzy")]
    runs = {run["kind"]: run["curves"] for run in of_owner}
    panel, extended = found(view, "extended")
    assert [one["name"] for one in panel["series"]] == ["baseline", "extended"] and panel["title"] == "chosen"
    assert extended["x"][0] == -1 and extended["x"][-1] == 1 and extended["y"][0] == 0
    assert extended["y"][-1] == pytest.approx(runs["extend_sft"]["chosen"][-1] + runs["extend_dpo"]["chosen"][-1])
    assert panel["y"] == "change of log π since the start of SFT (nats)" and panel["marks"] == [0.0]


def test_other_figures_have_no_views():
    assert curves.views("fig-03-teaches", [], []) == []
