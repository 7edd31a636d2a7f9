"""What a figure draws is read back from its axes: a number that is not in the figure must not stand under it."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns

from lddyn.chapters import style


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def read(fig):
    """The only panel of a figure, and its only series."""
    (panel,) = style.panels(fig)
    (series,) = panel["series"]
    return panel, series


def test_a_line_has_the_band_that_was_drawn_behind_it_and_no_other():
    fig, ax = plt.subplots()
    values = np.array([[0.0, 1.0, 4.0], [0.0, 3.0, 2.0]])
    style.band(ax, np.array([0.0, 0.5, 1.0]), values, style.BLUE, "chosen")
    style.band(ax, np.array([0.0, 0.5, 1.0]), values[:1], style.BLUE, "chosen_semantic", linestyle="--")
    first, second = style.panels(fig)[0]["series"]
    assert (first["name"], first["kind"], first["dash"], first["mark"]) == ("chosen", "line", "-", "o")
    assert (first["x"], first["y"]) == ([0, 0.5, 1], [0, 2, 3])
    assert (first["low"], first["high"]) == ([0, 1, 2], [0, 3, 4])
    assert (second["y"], second["low"], second["dash"]) == ([0, 1, 4], None, "--")


def test_panels_are_named_by_title_or_label_and_take_the_labels_of_their_row_and_column():
    fig, axes = plt.subplots(2, 2)
    for ax in axes.flat:
        ax.plot([1, 2], label="_a hidden name")
    axes[0, 0].set_title(r"$\|A\|_F$")
    axes[1, 1].set_label("small: rejected")
    axes[1, 0].set_xlabel("epoch")
    axes[0, 0].set_ylabel("change of\nlog π (nats)")
    found = [(panel["title"], panel["x"], panel["y"], panel["series"][0]["name"]) for panel in style.panels(fig)]
    assert found == [
        ("‖A‖_F", "epoch", "change of log π (nats)", "a hidden name"),
        ("", "", "change of log π (nats)", "a hidden name"),
        ("‖A‖_F", "epoch", "", "a hidden name"),
        ("small: rejected", "", "", "a hidden name"),
    ]


@pytest.mark.parametrize("lying", [False, True])
def test_bars_have_words_and_whiskers_also_when_they_lie(lying):
    fig, ax = plt.subplots()
    draw, name, label = (ax.barh, "xerr", ax.set_xlabel) if lying else (ax.bar, "yerr", ax.set_ylabel)
    draw(["before", "after"], [2.0, 3.0], label="train", **{name: [[0.5, 0.25], [0.5, 1.0]]})
    label("points")
    panel, bars = read(fig)
    assert (panel["y"], bars["name"], bars["kind"]) == ("points", "train", "bars")
    assert (bars["x"], bars["y"], bars["low"], bars["high"]) == (["before", "after"], [2, 3], [1.5, 2.75], [2.5, 4])


def test_grouped_bars_beside_a_tick_belong_to_its_word():
    fig, ax = plt.subplots()
    for n in range(2):
        ax.bar(np.arange(2) + 0.38 * n, [1, 2], 0.36, label=f"group {n}")
    ax.set_xticks([0.19, 1.19], ["y*", "the rest"])
    assert [one["x"] for one in style.panels(fig)[0]["series"]] == [["y*", "the rest"]] * 2


def test_dots_in_rows_of_words_are_turned_also_in_panels_that_share_the_words():
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax in axes:
        ax.plot([0.5, 0.7], [0, 1], "o", label="seeds")
        ax.set(yticks=[0, 1], yticklabels=["data", "own"], xlabel="nats")
    for panel in style.panels(fig):
        (dots,) = panel["series"]
        assert (panel["y"], dots["kind"], dots["x"], dots["y"]) == ("nats", "points", ["data", "own"], [0.5, 0.7])


def test_error_bars_are_one_series_without_their_caps():
    fig, ax = plt.subplots()
    ax.errorbar([0, 2], [0.4, 0.6], yerr=[[0.1, 0.2], [0.2, 0.1]], marker="o", capsize=3, label="greedy")
    _, series = read(fig)
    assert (series["name"], series["kind"], series["y"]) == ("greedy", "line", [0.4, 0.6])
    assert (series["low"], series["high"]) == ([0.3, 0.4], [0.6, 0.7])


def test_a_heat_map_names_rows_and_columns_and_leaves_out_empty_cells_and_the_colour_bar():
    fig, ax = plt.subplots()
    cells = pd.DataFrame([[1.0, np.nan], [3.0, 4.0]], index=["chosen", "rejected"], columns=["SFT", "DPO"])
    sns.heatmap(cells, ax=ax, annot=True)
    ax.set(title="share", xlabel="trained on")
    (panel,) = style.panels(fig)
    found = {row["name"]: dict(zip(row["x"], row["y"], strict=True)) for row in panel["series"]}
    assert found == {"chosen": {"SFT": 1}, "rejected": {"SFT": 3, "DPO": 4}}
    assert (panel["x"], panel["y"]) == ("trained on", "share")


def test_points_take_the_name_that_is_written_at_them_and_lines_at_zero_are_no_data():
    fig, ax = plt.subplots()
    for name, x in {"DPO": 1.0, "IPO": 2.0}.items():
        ax.scatter(x, -x, color=style.RED)
        ax.annotate(name, (x, -x), xytext=(3, 3), textcoords="offset points")
    ax.axhline(0)
    ax.axvline(1, label="a mark")
    ax.axline((0, 0), slope=1, label="equal")
    ax.axhspan(-1, 0)
    ax.axhline(0.25, label="the bar")
    ax.scatter([], [])
    ax.plot([], [], label="nothing")
    ax.plot([0, 1], [np.nan, np.nan], label="not measured")
    found = [(one["name"], one["x"], one["y"]) for one in style.panels(fig)[0]["series"]]
    assert sorted(found) == [("DPO", [1], [-1]), ("IPO", [2], [-2]), ("the bar", [None], [0.25])]


def test_values_on_another_scale_are_those_of_the_data():
    fig, ax = plt.subplots()
    ax.barh(["chosen"], [-18.5])
    ax.set_xscale("symlog")
    assert read(fig)[1]["y"] == [-18.5]


def test_no_two_types_of_response_look_alike_without_colour():
    looks = [(style.MARKS[color], line) for color, line in style.STYLES.values()]
    assert len(set(looks)) == len(looks) == 12
    assert len(set(style.MARKS.values())) == len(style.MARKS)


@pytest.mark.parametrize("color", style.MARKS)
def test_every_colour_stands_out_from_white_paper(color):
    channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    assert 1.05 / (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) >= 3  # WCAG 1.4.11


def test_a_line_that_stands_upright_across_a_panel_is_a_mark_and_no_series():
    fig, ax = plt.subplots()
    ax.plot([-1, 2], [0, 1])
    ax.axvline(0.5)
    panel, _ = read(fig)
    assert panel["marks"] == [0.5]
