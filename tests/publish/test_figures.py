"""What stands under a figure: its data, its origin and its alternative text must be its own."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lddyn.chapters import style
from lddyn.engine import store
from lddyn.publish import figures, notebooks, pages


def line(name, x, y, **more):
    return {"name": name, "kind": "line", "x": x, "y": y, "low": None, "high": None} | more


def panel(*series, **more):
    return {"title": "", "x": "epoch", "y": "nats", "row": 0, "column": 0, "series": list(series)} | more


def test_the_csv_has_every_point_once_with_its_band():
    drawn = [
        panel(line("a, b", [0.0, 1.0], [0.0, 2.5], low=[0.0, 2.0], high=[0.0, 3.0])),
        panel(line("c", ["x"], [1.0])),
    ]
    head, *rows = csv.reader(io.StringIO(figures.table(drawn)))
    assert tuple(head) == figures.COLUMNS
    assert rows == [
        ["", "a, b", "epoch", "nats", "0.0", "0.0", "0.0", "0.0"],
        ["", "a, b", "epoch", "nats", "1.0", "2.5", "2.0", "3.0"],
        ["", "c", "epoch", "nats", "x", "1.0", "", ""],
    ]


def test_the_alternative_text_says_axes_and_ends():
    drawn = [panel(line("chosen", [0, 1], [0.0, 12.34]), title="SFT"), panel(line("", ["a"], [2.0], kind="bars"), x="")]
    assert figures.words(drawn) == "2 panels. SFT; nats over epoch: chosen from 0 to 12.3. nats: 2 at a."


def test_a_crowded_figure_has_a_short_alternative_text():
    curves = [line(f"response type {n}", [0, 1], [0.0, -n]) for n in range(12)]
    assert "response type 3 from 0 to -3" in figures.words([panel(*curves)])
    four = figures.words([panel(*curves, title=f"panel {n}") for n in range(4)])
    assert "panel 3; nats over epoch: 12 lines between -11 and 0." in four and "from 0" not in four
    many = figures.words([panel(*curves, title=f"panel {n}") for n in range(44)])
    assert "528 lines between -11 and 0" in many and len(many) < 1.5 * figures.LONGEST


@pytest.mark.parametrize(
    ("drawn", "shown"),
    [
        (panel(line("chosen", [0, 1], [0.0, 1.0])), True),
        (panel(line("", ["unrelated"], [1.0], kind="bars")), True),
        (panel(line("a", [0, 1], [0.0, 1.0]), title="other_test"), True),
        (panel(line("on chosen", [0, 1], [0.0, 1.0])), False),
        (panel(line("y*", [None], [1.0])), False),
    ],
)
def test_a_figure_with_a_kind_of_response_links_to_what_it_is(tmp_path, extension, drawn, shown):
    figures.write(tmp_path / "f.svg", [drawn], ["make book"], {}, "here")
    content = json.loads((tmp_path / "f.json").read_text())
    links = extension.under(content, "/f.csv", "../").findall(lambda node: type(node) is extension.nodes.reference)
    assert [link["refuri"] for link in links] == ["../notebooks/03_sft.html#kinds-by-example"] * shown


# --- where a figure of a notebook comes from ---------------------------------------------------------------------

CELLS = [
    "from lddyn.chapters import style\nfrom lddyn.chapters.sft import figures",
    "runs = pool.run_all(run, grid)\ntable = store.frame(runs)\nmain = table[table.n > 1]",
    "figures.early_curves(main, 2);",
    "real, plain = store.frame(recorded.read('03_sft', 'main')), store.frame(recorded.read('03_sft', 'plain'))",
    "style.two_scales({'real': (real, 1.0)});",
    "cells, made = store.kept('sweeps/trends')\nfigures.size_trends(cells);",
    "main = [run for real in runs]\nstyle.response_curves([plain for plain in steps(3)], main)",
    "rows = {}\nfor name in real:\n    rows[name] = real[name]\nstyle.two_scales(rows)",
    "display.Results('03_sft', scale, runs)",
]


@pytest.mark.parametrize(
    ("cell", "function", "read", "own"),
    [
        (2, "figures.early_curves", [], True),
        (4, "style.two_scales", ["recorded.read('03_sft', 'main')"], False),
        (5, "figures.size_trends", ["store.kept('sweeps/trends')"], False),
        (6, "style.response_curves", [], True),
        (7, "style.two_scales", ["recorded.read('03_sft', 'main')"], False),
    ],
)
def test_a_figure_names_the_runs_that_it_draws_and_no_others(cell, function, read, own):
    drawn, calls, judged = figures.drawing(CELLS, cell)
    records = [call for call in map(figures.ast.unparse, calls) if call.startswith(("recorded.read", "store.kept"))]
    assert (drawn, records, judged) == (function, read, own)


def test_commands_and_origins_are_those_of_what_is_drawn():
    _, calls, _ = figures.drawing(CELLS, 4)
    commands, made = figures.origins("03_sft", "laptop", [], calls)
    assert commands[0] == "make pretrained PIECES=03_sft/main"
    assert commands[1:] == ["python -m lddyn run 03_sft --scale laptop --out 03_sft.ipynb"]
    assert list(made) == ["recorded runs 03_sft/main"] and "3 seeds (10, 11, 12)" in made["recorded runs 03_sft/main"]
    assert "commit" in made["recorded runs 03_sft/main"]
    _, made = figures.origins("04_squeezing", "laptop", [], [])
    assert made["computed in the notebook"].startswith("scale laptop · no run · commit ")


def test_a_figure_says_where_it_is_drawn():
    assert figures.where("figures.early_curves", CELLS).startswith("lddyn/chapters/sft/figures.py:")
    assert figures.where("style.two_scales", CELLS).endswith("(two_scales)")


@pytest.mark.parametrize("name", pages.chapters())
def test_every_figure_of_a_notebook_is_drawn_by_one_function_that_is_found(name):
    cells = [c for c in json.loads(notebooks.notebook_path(name).read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    labels = [c["metadata"].get("mystnb", {}).get("figure", {}).get("name") for c in cells]
    assert any(labels)
    for n in (n for n, label in enumerate(labels) if label):
        function, calls, _ = figures.drawing(sources, n)
        assert figures.where(function, sources)
        figures.origins(name, "smoke", [], calls)


def test_the_command_of_a_kept_table_is_that_of_the_text():
    for kept, command in figures.REMAKE.items():
        cells = json.loads(notebooks.notebook_path(command.split()[4]).read_text())["cells"]
        text = "".join(line for cell in cells for line in cell["source"]).replace("\\", " ")
        assert command in " ".join(text.split()), kept


# --- the extension -----------------------------------------------------------------------------------------------


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(store.ROOT / "book" / "_ext"), *sys.path])
    import under_figures

    return under_figures


def test_what_stands_under_a_figure_is_no_html_of_its_own(extension):
    content = {"views": [{"model": "</script><b>"}], "commands": ["make book"], "made": {"runs": "<i>"}, "source": "x"}
    nodes = extension.under(content | {"kinds": None}, "/generated/figures/a.csv", "")
    raw = "".join(node.astext() for node in nodes.findall(extension.nodes.raw))
    assert raw.count("</script>") == 1 and "<b>" not in raw and "<i>" not in raw
    (csv_file,) = nodes.findall(extension.addnodes.download_reference)
    assert csv_file["reftarget"] == "/generated/figures/a.csv"


def test_a_figure_that_nobody_knows_is_a_warning(extension, tmp_path, monkeypatch):
    from docutils import nodes, utils

    told = []
    monkeypatch.setattr(extension.log, "warning", lambda message, **_: told.append(message))
    document = utils.new_document("page")
    known, other = (nodes.figure("", nodes.image(uri=f"{name}.svg", alt="typed"), ids=[name]) for name in ("hero", "b"))
    document += [known, other]
    figures.write(
        tmp_path / "generated/figures/hero.svg", [panel(line("a", [0, 1], [0.0, 1.0]))], ["make book"], {}, "x"
    )
    transform = SimpleNamespace(
        document=document, env=SimpleNamespace(srcdir=tmp_path, docname="intro", note_dependency=lambda _: None)
    )
    extension.UnderFigures.apply(transform)
    assert told == ["nothing is known of the figure ['b']"]
    assert known[0]["alt"] == "nats over epoch: a from 0 to 1." and isinstance(known[-1], nodes.legend)


def test_written_under_a_figure_is_what_its_axes_hold(tmp_path):
    fig, ax = plt.subplots()
    style.band(ax, np.array([0.0, 1.0]), np.array([[0.0, 1.0], [0.0, 3.0]]), style.RED, "rejected")
    ax.set(xlabel="epoch", ylabel="nats")
    figures.write(tmp_path / "made" / "f.svg", style.panels(fig), ["make book"], {"runs": "2 seeds"}, "here")
    plt.close(fig)
    assert (tmp_path / "made" / "f.csv").read_text().splitlines()[2] == ",rejected,epoch,nats,1.0,2.0,1.0,3.0"
    under = json.loads((tmp_path / "made" / "f.json").read_text())
    assert (under["alt"], under["views"]) == ("nats over epoch: rejected from 0 to 2.", [])
