"""What stands under every figure of the book, and its alternative text: made in one place, from what the figure draws.

`write` makes two files for each figure, in `book/generated/figures/`: its data as CSV, and the rest as JSON, which the
extension `book/_ext/under_figures.py` sets under the figure's caption.
"""

import ast
import csv
import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lddyn.chapters import style
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import cache, reach, recorded, store
from lddyn.publish import curves, display

COLUMNS = ("panel", "series", "x axis", "y axis", "x", "y", "low", "high")
KINDS = f"notebooks/03_sft.html#{display.EXAMPLE}"  # where the kinds of response are explained
LONGEST = 1000  # letters of an alternative text
NOUNS = {
    "line": ("line", "lines"),
    "points": ("set of points", "sets of points"),
    "bars": ("set of bars", "sets of bars"),
    "cells": ("row of cells", "rows of cells"),
}
Panels = Sequence[Mapping[str, Any]]


def write(
    path: Path, drawn: Panels, commands: Sequence[str], made: Mapping[str, str], source: str, views: Sequence[dict] = ()
) -> None:
    """Keep what stands under a figure, beside `path` with the suffixes .csv and .json.

    drawn: `style.panels`; commands: that make it again; made: what was run -> its origin in words; source: what draws
    it; views: what its curves can be switched to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomically(path.with_suffix(".csv"), lambda file: file.write_text(table(drawn)))
    under = {"alt": words(drawn), "commands": commands, "made": made, "source": source, "views": views}
    under["kinds"] = KINDS if shows_kinds(drawn) else None
    store.write_json(path.with_suffix(".json"), under)


def table(drawn: Panels) -> str:
    """The data of a figure as CSV, one row a point: `low` and `high` are the ends of its band or whiskers."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for panel in drawn:
        for one in panel["series"]:
            ends = [one[end] or [None] * len(one["y"]) for end in ("low", "high")]
            for point in zip(one["x"], one["y"], *ends, strict=True):
                rows.writerow((panel["title"], one["name"], panel["x"], panel["y"], *point))
    return text.getvalue()


def shows_kinds(drawn: Panels) -> bool:
    """Whether a kind of response is named in a figure: as a panel, a series or a place on an axis."""
    series = [one for panel in drawn for one in panel["series"]]
    named = {panel["title"] for panel in drawn}.union(*([one["name"], *one["x"]] for one in series))
    return not named.isdisjoint(RESPONSE_TYPES)


# --- alternative text --------------------------------------------------------------------------------------------


def words(drawn: Panels) -> str:
    """What is to be seen, in at most about `LONGEST` letters: axes, and where every series begins and ends.

    Where that is too long, what there is in each panel and how far it reaches; then the same for the whole figure.
    """
    count = "" if len(drawn) == 1 else f"{len(drawn)} panels. "
    for tell in (_each_series, _together):
        text = count + " ".join(f"{_axes(panel)}: {tell([panel])}." for panel in drawn)
        if len(text) <= LONGEST:
            return text
    titles = ", ".join(dict.fromkeys(panel["title"] for panel in drawn))
    return f"{count}{titles}; {_axes(dict(drawn[-1]) | {'title': ''})}: {_together(drawn)}."


def _axes(panel: Mapping[str, Any]) -> str:
    what = "; ".join(filter(None, dict.fromkeys((panel["title"], panel["y"])))) or "value"
    return f"{what} over {panel['x']}" if panel["x"] else what


def _each_series(of: Panels) -> str:
    told = []
    for one in of[0]["series"]:
        kind, y = one["kind"], one["y"]
        if kind == "line" and len(y) > 1:
            ends = f"from {y[0]:.3g} to {y[-1]:.3g}"
        elif kind == "cells" or len(y) > 12:
            ends = f"{len(y)} {kind} between {min(y):.3g} and {max(y):.3g}"
        else:
            ends = ", ".join(f"{value:.3g}{_at(x)}" for x, value in zip(one["x"], y, strict=True))
        told.append(f"{one['name']} {ends}".strip())
    return "; ".join(told)


def _at(x: float | str | None) -> str:
    return "" if x is None else f" at {x if isinstance(x, str) else format(x, '.3g')}"


def _together(of: Panels) -> str:
    series = [one for panel in of for one in panel["series"]]
    kinds = {kind: sum(one["kind"] == kind for one in series) for kind in dict.fromkeys(one["kind"] for one in series)}
    values = [value for one in series for value in one["y"]]
    counts = " and ".join(f"{number} {NOUNS[kind][number > 1]}" for kind, number in kinds.items())
    return f"{counts} between {min(values):.3g} and {max(values):.3g}"


# --- the figures of chapters -------------------------------------------------------------------------------------

REMAKE = {  # how a kept table is made again that is no sweep, and recorded runs that `make pretrained` does not make
    "01_mnist/mnist": "python -m lddyn run 01_mnist -p data mnist -p n_train 1000 -p n_test 9000 -p record mnist "
    "--out mnist.ipynb",
    "recorded/when_top_rises": "python -m lddyn run 05_dpo -p few 128 -p seeds 8 -p first_seed 300 "
    "-p record book/recorded/when_top_rises.json --out larger.ipynb",
}


def write_chapter(folder: Path, executed: Path, scale: str, runs: Sequence[store.Run]) -> None:
    """Keep in a folder what stands under every figure of an executed notebook, whose runs these are."""
    cells = [cell for cell in json.loads(executed.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    for n, cell in enumerate(cells):
        for output in cell["outputs"]:
            if drawn := output.get("data", {}).get(style.DRAWN):
                name = cell["metadata"]["mystnb"]["figure"]["name"]
                draws, reads, own = drawing(sources, n)
                commands, made = origins(executed.stem, scale, runs if own else [], reads)
                source = f"{where(draws, sources)}, called in notebooks/{executed.name}"
                write(folder / name, drawn, commands, made, source, curves.views(name, drawn, runs))


def drawing(sources: Sequence[str], n: int) -> tuple[str, list[ast.Call], bool]:
    """What cell `n` of a notebook draws with and from what, by its code and that of the cells before it.

    The function of `figures` or `style` that it calls; the calls that its arguments come from; and whether the runs
    are among them that the chapter's verdicts are judged by, which it hands to `display.Results`.
    """
    results = [call for source in sources for call in _calls(ast.parse(source)) if _dotted(call) == "display.Results"]
    judged = {name for call in results for name in _names(call.args[2])}
    drawn = next(c for c in _calls(ast.parse(sources[n])) if _dotted(c).startswith(("figures.", "style.")))
    needed, reads, own = _names(drawn), [], False
    for statement in reversed([part for source in sources[: n + 1] for part in _statements(source)]):
        if bound := _bound(statement) & needed:
            own |= bool(bound & judged)
            needed -= bound if isinstance(statement, ast.Assign) else set()
            needed |= _names(statement)
            reads += _calls(statement)
    return _dotted(drawn), reads, own


def _statements(source: str) -> Iterator[ast.stmt]:
    """Those of a cell; `a, b = c, d` counts as two."""
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(names) == len(values):
                yield from (ast.Assign([name], value) for name, value in zip(names, values, strict=True))
            case _:
                yield statement


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _dotted(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _names(tree: ast.AST) -> set[str]:
    """The names that it reads."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return read - _own(tree)


def _own(tree: ast.AST) -> set[str]:
    """The names that its comprehensions bind."""
    targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.comprehension)]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement gives a value, or changes an entry of."""
    bound = {statement.name} if isinstance(statement, ast.FunctionDef) else set()
    for node in ast.walk(statement):
        if isinstance(getattr(node, "ctx", None), ast.Store):
            base = node.value if isinstance(node, ast.Subscript) else node
            bound |= {base.id} if isinstance(base, ast.Name) else set()
    return bound - _own(statement)


def where(function: str, sources: Sequence[str]) -> str:
    """File, line and name of a function that cells call by this name: `lddyn/chapters/style.py:110 (two_scales)`."""
    module, _, name = function.partition(".")
    imported = reach.imported(ast.parse("\n".join(sources)))
    return place(resolve_name(f"{imported[module]}.{name}"))


def place(function: Callable) -> str:
    file = Path(inspect.getfile(function)).relative_to(store.ROOT)
    return f"{file}:{inspect.getsourcelines(function)[1]} ({function.__name__})"


def origin(runs: Sequence[store.Run]) -> str:
    """Seeds, machine, time, versions and commit of runs, out of their manifests."""
    return store.in_words(store.origin(runs))


def origins(chapter: str, scale: str, runs: Sequence[store.Run], reads: Sequence[ast.Call]) -> tuple[list[str], dict]:
    """The commands that make a chapter's figure again, and where its numbers come from: what -> its origin in words.

    runs: the chapter's own, if the figure draws them; reads: calls, of which `recorded.read` and `store.kept` count.
    """
    commands, made = [], {}
    if runs:
        made[f"runs of this chapter, scale {scale}"] = origin(runs)
    for call in reversed(reads):
        arguments = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
        if _dotted(call) == "recorded.read":
            group = "/".join(arguments)
            made[f"recorded runs {group}"] = origin(recorded.read(*arguments))
            commands.append(REMAKE.get(group, f"make pretrained PIECES={group}"))
        elif _dotted(call) == "store.kept":
            made[f"recorded table book/{arguments[0]}.json"] = store.in_words(store.kept(arguments[0])[1])
            commands.append(REMAKE.get(arguments[0], f"python -m lddyn sweep book/{arguments[0]}.yml"))
    git = cache.git_state()
    computed = f"scale {scale} · no run · commit {git['commit'] or 'unknown'}{'+' if git['dirty'] else ''}"
    command = f"python -m lddyn run {chapter} --scale {scale} --out {chapter}.ipynb"
    return [*dict.fromkeys(commands), command], made or {"computed in the notebook": computed}
