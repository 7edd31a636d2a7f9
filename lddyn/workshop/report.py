"""`python -m lddyn report runs/mine`: the paper's curves and the scorecard of a training of your own, as one HTML page.

The statistics and rules are those of chapters 3 and 5. One run cannot replicate or refute a claim; the page says
whether the rule holds in this run. Several folders are taken for several seeds, and intervals decide.
"""

import io
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lddyn import InputError, unknown
from lddyn.chapters import claims
from lddyn.chapters.style import BLUE, ORANGE, PANELS, band, change_panel, curves, use_style
from lddyn.engine import store

CHAPTERS = {"sft": "03_sft", "dpo": "05_dpo"}
FUNCTIONS = {"lddyn.chapters.sft.run:finetune": "sft", "lddyn.chapters.dpo.run:align": "dpo"}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:.85rem}td,th{border-top:1px solid #ccc;padding:.4rem;text-align:left;
vertical-align:top}svg{max-width:100%;height:auto}.scroll{overflow-x:auto}.holds{color:#2f855a}.fails{color:#c53030}
.not-measured{color:#718096}"""


def read(folders: Sequence[Path]) -> list[store.Run]:
    """The runs, each with a `seed` column; prompts whose ids name no split count as trained on.

    Raises `RecordError` for a folder that is no finished record.
    """
    runs = []
    for seed, folder in enumerate(folders):
        run = store.load(folder)
        ids = run.table.prompt_id.astype(str)
        named = ids.str.startswith(("train/", "test/")) | (ids == "batch")
        table = run.table.assign(prompt_id=ids.where(named, "train/" + ids).astype("category"), seed=seed)
        runs.append(run._replace(table=table))
    return runs


def method_of(runs: Sequence[store.Run], method: str | None) -> str:
    """`sft` or `dpo`, from the manifest where it says so; raises `InputError` when it does not and none is given."""
    manifest = runs[0].manifest
    method = method or manifest["parameters"].get("method") or FUNCTIONS.get(manifest["function"])
    if method is None:
        raise InputError(f"{runs[0].folder} does not say what was trained: add --method sft or --method dpo")
    if method not in CHAPTERS:
        raise unknown("method", method, CHAPTERS)
    return method


def scorecard(runs: Sequence[store.Run], method: str) -> list[dict]:
    """The claims of a chapter, judged on these runs, as `claims.verdicts` gives them.

    The verdict is `holds`, `partly`, `fails`, `undecided` (an interval too wide) or `not measured`.
    """
    tables, entries = [run.table for run in runs], []
    for claim in claims.ledger():
        if claim.get("chapter") != CHAPTERS[method] or "parts" not in claim or "sweep" in claim:
            continue
        judged = (_judged(part, tables) for part in claims.parts(claim) if part["chapter"] == CHAPTERS[method])
        parts = [part for part in judged if part]
        outcomes = {part["outcome"] for part in parts}
        verdict = "not measured" if not parts else outcomes.pop() if len(outcomes) == 1 else "partly"
        shown = {name: claim.get(name) for name in ("id", "claim", "source", "paper", "authors", "chapter")}
        reason = "this run lacks the responses or the further runs that it needs"
        entries.append(
            shown | {"parts": parts, "verdict": verdict, "reason": reason, "released": claims.of_logs(claim)}
        )
    return entries


def _judged(part: dict, tables: Sequence[pd.DataFrame]) -> dict | None:
    """One part of a claim; None where the tables do not measure it."""
    one = len(tables) == 1
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # NumPy and SciPy, for curves of two points
        judged = claims.judge({**part, "exact": True} if one else part, tables)
    if judged["ours"] is None or not np.isfinite(judged["ours"]):
        return None
    return judged | ({"interval": None} if one else {})


def figure(table: pd.DataFrame) -> Figure:
    """Change of log pi of each type that was measured, and of y* along the chosen and the rejected answers."""
    there = set(table.response_type)
    panels = {title: [kind for kind in kinds if kind in there] for title, kinds in PANELS.items()}
    panels = {title: kinds for title, kinds in panels.items() if kinds}
    rows = -(-(len(panels) + 1) // 3)
    fig, axes = plt.subplots(rows, 3, figsize=(9, 3 * rows), squeeze=False)
    *first, last = axes.flat[: len(panels) + 1]
    for ax, (title, kinds) in zip(first, panels.items(), strict=True):
        change_panel(ax, table, kinds, title, per_epoch=1)
    for kind, color in (("chosen", BLUE), ("rejected", ORANGE)):
        if kind in there:
            steps, values = curves(table, kind, "argmax_logp_sum")
            band(last, steps, values - values[:, :1], color, f"along {kind}")
    last.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    last.set_title("log π(y*)")
    last.legend(fontsize=7)
    for ax in axes.flat[len(panels) + 1 :]:
        ax.remove()
    for ax in [*first, last]:
        ax.set_xlabel("optimiser step")
    for ax in axes[:, 0]:
        ax.set_ylabel("change of log π (nats)")
    return fig


def page(runs: Sequence[store.Run], method: str) -> str:
    """The HTML page: curves, scorecard, where the numbers come from."""
    use_style()
    table = pd.concat([run.table for run in runs], ignore_index=True)
    svg = io.StringIO()
    drawn = figure(table.astype({"response_type": "category", "metric": "category"}))
    drawn.savefig(svg, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(drawn)
    prompts = table[table.prompt_id != "batch"].prompt_id.nunique()
    facts = [f"{method.upper()}, {len(runs)} run{'s' * (len(runs) > 1)}", f"{prompts} prompts"]
    facts += [f"{name} {value}" for name, value in runs[0].manifest["parameters"].items() if name in ("lr", "seed")]
    facts += [f"{name} {version}" for name, version in runs[0].manifest["versions"].items()]
    facts.append(f"finished {runs[0].manifest['finished']}")
    first = runs[0].manifest.get("since", 0)
    since = f"step {first}, before which nothing was measured" if first else "the start of this training"
    cautions = dict.fromkeys(message for run in runs for message in run.manifest.get("cautions", []))
    told = "".join(f"<p><strong>Caution.</strong> {escape(message)}</p>" for message in cautions)
    who = ", ".join(run.folder.name for run in runs)
    image = svg.getvalue()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Learning dynamics of {escape(who)}</title>
<style>{STYLE}</style></head><body>
<h1>Learning dynamics of {escape(who)}</h1>
<p>{escape(" · ".join(facts))}</p>
<h2>Curves</h2>
<p>Mean over the probed prompts, summed over the tokens of a response, since {since}.</p>{told}
<div role="img" aria-label="Change of log-probability of each kind of response over training">{
        image[image.index("<svg") :]
    }
</div>
<h2>Scorecard of this training</h2>
<p>The rules of the companion's claims, applied to these numbers. {
        "One run has no interval: it shows what"
        if len(runs) == 1
        else "95% intervals over the runs decide: they show what"
    } held here, not whether the paper's claim does.</p>
{claims.as_html(scorecard(runs, method), here="this training")}
</body></html>
"""


def write(folders: Sequence[Path], method: str | None = None, out: Path | None = None) -> str:
    """Write the page of one or several runs; returns the scorecard as text, with the page's path at the end."""
    runs = read(folders)
    method = method_of(runs, method)
    out = out or Path(folders[0]) / "report.html"
    store.writable(out)
    html = page(runs, method)
    store.write_atomically(out, lambda p: p.write_text(html, encoding="utf-8"))
    lines = [f"{e['id']:>2}  {e['verdict']:<12} {e['claim']}" for e in scorecard(runs, method)]
    return "\n".join([*lines, str(out)])
