"""What the curves of a figure can be switched to: this chapter's model, the real one, released logs; sums or per token.

The first view is what the figure draws. Every other one is drawn by the same function from another table, and read back
from its axes as the first one was.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lddyn.chapters.dpo.figures import squeezed_paths
from lddyn.chapters.extend.figures import two_stages
from lddyn.chapters.sft.figures import early_curves
from lddyn.chapters.style import panels, response_curves, two_scales
from lddyn.chapters.variants.evidence import loss_runs
from lddyn.chapters.variants.figures import margins_over_steps
from lddyn.engine import recorded, store
from lddyn.publish import paper_scale

PER_TOKEN = {"logp_mean": "logp_sum", "argmax_logp_mean": "argmax_logp_sum"}
Panels = Sequence[Mapping[str, Any]]


class Model(NamedTuple):
    name: str
    table: pd.DataFrame  # of its runs (`store.frame`)
    steps: tuple[float, ...] = ()  # optimiser steps in a unit of x, for each column of panels; none: not known
    seeds: tuple[int, ...] = (1,)  # for each column of panels
    x: str = ""  # what the axis counts, where not what the figure says
    y: str = ""  # the same of the values
    stages: tuple[float, float] = (0, 0)  # epochs of SFT and of the DPO after it


def views(figure: str, drawn: Panels, runs: Sequence[store.Run]) -> list[dict[str, Any]]:
    """The views of a figure, `model, unit, panels` of each; none where its curves do not answer.

    drawn: what it draws (`style.panels`); runs: of its chapter.
    """
    if figure not in DRAW:
        return []
    models, draw = DRAW[figure]
    found = []
    for n, model in enumerate(models(runs)):
        for unit, table in (("sum", model.table), ("per token", per_token(model.table))):
            if n == 0 and unit == "sum":
                found.append(_view(model, unit, drawn))
            elif len(table):
                figure_of = draw(model._replace(table=table), drawn)
                found.append(_view(model, unit, panels(figure_of)))
                plt.close(figure_of)
    return found


def per_token(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose sums over the tokens of a response are the means over them; empty where it has none."""
    rows = table[table.metric.isin(PER_TOKEN)]
    return rows.assign(metric=rows.metric.astype(str).map(PER_TOKEN))


def _view(model: Model, unit: str, drawn: Panels) -> dict[str, Any]:
    shown = []
    for panel in drawn:
        column = panel["column"]
        steps = model.steps[column % len(model.steps)] if model.steps else None
        y = model.y or panel["y"]
        y = y.replace("(nats)", "(nats per token)") if unit == "per token" else y
        kept = {key: panel[key] for key in ("title", "row", "column", "marks", "series")}
        seeds = model.seeds[column % len(model.seeds)]
        shown.append(kept | {"x": model.x or panel["x"], "y": y, "steps": steps, "seeds": seeds})
    return {"model": model.name, "unit": unit, "panels": shown}


# --- the models of a chapter -------------------------------------------------------------------------------------


def _model(name: str, runs: Sequence[store.Run], **which: object) -> Model:
    """Of these runs those with the values of some parameters; the axis counts epochs."""
    kept = [run for run in runs if which.items() <= run.manifest["parameters"].items()]
    table = store.frame(kept)
    return Model(name, table, (table.step.max() / kept[0].manifest["parameters"]["epochs"],), _seeds(table))


def _seeds(table: pd.DataFrame) -> tuple[int]:
    return (int(table.seed.nunique()),)


def _logs(*kinds: str) -> list[Model]:
    """The longest released log of each model and start, as a table of one seed and one prompt."""
    found = []
    for run in paper_scale.longest(paper_scale.runs(*kinds)):
        values = [
            (at, at, "train/0", kind, "logp_sum", value)
            for kind, curve in run["curves"].items()
            if kind != paper_scale.TOP
            for at, value in zip(run["at"], curve, strict=True)
        ]
        name = f"released log: {run['model']}, {run['run']} ({run['repository'].split('/')[0]})"
        found.append(Model(name, store.long(values).assign(seed=0), (float(run["at"][-1]),), x="share of the log"))
    return found


def _stage_logs() -> list[Model]:
    """Released logs of SFT and of the DPO after it, on one axis: of each model with all four of one repository."""
    stages = {"baseline": ("sft", "dpo"), "extended": ("extend_sft", "extend_dpo")}
    logs: dict[tuple[str, str], dict[str, Mapping]] = {}
    for run in paper_scale.longest(paper_scale.runs(*itertools.chain(*stages.values()))):
        logs.setdefault((run["model"], run["repository"]), {})[run["kind"]] = run
    found = []
    for (model, repository), of in logs.items():
        if not of.keys() >= set(itertools.chain(*stages.values())):
            continue
        tables = [_joined(of[sft], of[dpo]).assign(arm=arm) for arm, (sft, dpo) in stages.items()]
        axes = {"x": "share of each log; DPO starts at 0", "y": "change of log π since the start of SFT (nats)"}
        name = f"released logs: {model} ({repository.split('/')[0]})"
        found.append(Model(name, pd.concat(tables, ignore_index=True).assign(seed=0), **axes, stages=(1, 1)))
    return found


def _joined(sft: Mapping, dpo: Mapping) -> pd.DataFrame:
    """The log of an SFT, at steps below zero, and that of the DPO after it, as a table of one prompt."""
    values = []
    for kind in sft["curves"].keys() & dpo["curves"].keys():
        named = ("chosen", "argmax_logp_sum") if kind == paper_scale.TOP else (kind, "logp_sum")
        first, then = sft["curves"][kind], dpo["curves"][kind]
        points = [(at - sft["at"][-1], value) for at, value in zip(sft["at"][:-1], first[:-1], strict=True)]
        points += [(at, first[-1] + value) for at, value in zip(dpo["at"], then, strict=True)]
        values += [(at, at, "train/0", *named, value) for at, value in points]
    return store.long(values)


def _sft(runs: Sequence[store.Run]) -> list[Model]:
    whole = max(run.manifest["parameters"]["n_train"] for run in runs)
    own = _model("small model", runs, target="chosen", n_train=whole)
    return [own, _model("SmolLM2-135M", recorded.read("03_sft", "main")), *_logs("sft")]


def _dpo(runs: Sequence[store.Run]) -> list[Model]:
    return [
        _model("small model", runs, measure="all"),
        _model("SmolLM2-135M after SFT", recorded.read("05_dpo", "after_sft")),
        _model("SmolLM2-135M", recorded.read("05_dpo", "from_chat")),
    ]


def _extend(runs: Sequence[store.Run]) -> list[Model]:
    own = [run for run in runs if run.manifest["parameters"]["design"] == "natural"]
    found = []
    for name, kept in {"small model": own, "SmolLM2-135M": recorded.read("07_extend", "natural")}.items():
        if kept:
            table, parameters = store.frame(kept), kept[0].manifest["parameters"]
            stages = parameters["sft_epochs"], parameters["epochs"]
            found.append(Model(name, table, seeds=_seeds(table), stages=stages))
    return found + _stage_logs()


def _losses(runs: Sequence[store.Run]) -> list[Model]:
    table = loss_runs(store.frame(runs))
    return [Model("small model", table, seeds=_seeds(table))]


def _side_by_side(models: Sequence[Model]) -> list[Model]:
    """All models in one table, told by its column `side`."""
    whole = pd.concat([model.table.assign(side=n) for n, model in enumerate(models)], ignore_index=True)
    steps, seeds = (tuple(getattr(model, key)[0] for model in models) for key in ("steps", "seeds"))
    return [Model("", whole, steps, seeds)]


# --- the figures -------------------------------------------------------------------------------------------------


def _beside(model: Model, drawn: Panels) -> Figure:
    heads = dict.fromkeys(panel["title"].split(": ")[0] for panel in drawn)
    sides = dict(zip(heads, (rows for _, rows in model.table.groupby("side")), strict=True))
    return two_scales({head: (sides[head], steps) for head, steps in zip(heads, model.steps, strict=True)})


def _kinds(model: Model, _: Panels) -> Figure:
    return response_curves(model.table, model.steps[0])


DRAW: dict[str, tuple[Callable, Callable]] = {  # how to find the models of a figure's chapter, and to draw one
    "fig-03-kinds": (_sft, _kinds),
    "fig-03-early": (_sft, lambda model, _: early_curves(model.table, model.steps[0])),
    "fig-03-real": (lambda runs: _side_by_side(_sft(runs)[:2]), _beside),
    "fig-05-kinds": (lambda runs: _dpo(runs) + _logs("dpo", "extend_dpo", "sparse_dpo"), _kinds),
    "fig-05-paths": (_dpo, lambda model, _: squeezed_paths(model.table, model.steps[0])),
    "fig-05-real": (lambda runs: _side_by_side(_dpo(runs)), _beside),
    "fig-06-stops": (
        _losses,
        lambda model, drawn: margins_over_steps(model.table, [s["name"] for s in drawn[0]["series"]]),
    ),
    "fig-07-two-stages": (_extend, lambda model, _: two_stages(model.table, *model.stages)),
}
