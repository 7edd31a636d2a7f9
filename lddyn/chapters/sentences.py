"""Statistics by name, the rules that judge them, and sentences that assert one: what they say, the table must say.

A text asserts in double braces: a statistic of a chapter's evidence with its arguments, and a relation.

    Rejected answers fall by {{end_change(kind=rejected) < 0}} nats, rephrases about as much.

On the page stands the value with its 95% interval over seeds, `-61.8 [-69.5, -54.0]`. The relation is a rule of the
ledger (`> 0`, `< 0`, `in [0.8, 1.2]`) that the whole interval must satisfy; or `around 0`, which asserts that it
contains the number; or none, for a value alone. A format may follow after a bar, `{{share_lost > 0.5 | .0%}}`; with
the format `none` a relation is checked and nothing shown.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lddyn import InputError
from lddyn.chapters import statistics

Tables = Callable[[str], Sequence[pd.DataFrame]]  # of a chapter, one for each seed


# --- statistics and rules ------------------------------------------------------------------------------------


def room(chapter: str) -> str:
    """The folder of a chapter in `lddyn.chapters`, from the name of its notebook: `sft` of 03_sft."""
    return {"01_mnist": "digits"}.get(chapter, chapter[3:])


def statistic(chapter: str, name: str) -> Callable[..., float]:
    """A statistic by name, from the chapter's evidence or from what chapters share; `InputError` if there is none."""
    try:
        own = import_module(f"lddyn.chapters.{room(chapter)}.evidence")
    except ModuleNotFoundError:
        raise InputError(f"there is no chapter {chapter!r}") from None
    found = getattr(own, name, None) or getattr(statistics, name, None)
    if not callable(found):
        raise InputError(f"chapter {chapter} has no statistic {name!r}")
    return found


def value(measure: Callable[..., float], table: pd.DataFrame, given: Mapping) -> float:
    """A statistic of one seed's table; not a number where the table does not measure it."""
    try:
        return measure(table, **given)
    except statistics.NotMeasured:
        return math.nan


def values(measure: Callable[..., float], given: Mapping, tables: Sequence[pd.DataFrame]) -> np.ndarray:
    """A statistic of every seed's table, without the seeds whose runs do not measure it."""
    found = np.array([value(measure, table, given) for table in tables])
    return found[~np.isnan(found)]


def rule(text: str, where: str) -> tuple[float, float]:
    """`> x`, `< x` or `in [x, y]` as an interval that a statistic must lie in; `InputError` for anything else."""
    number = r"([-+.\deE]+)"
    if match := re.fullmatch(rf"([<>]) {number}", text):
        bound = float(match[2])  # which does not satisfy it itself
        above = match[1] == ">"
        return (math.nextafter(bound, math.inf), math.inf) if above else (-math.inf, math.nextafter(bound, -math.inf))
    if match := re.fullmatch(rf"in \[{number}, {number}\]", text):
        return float(match[1]), float(match[2])
    raise InputError(f"{where}: rule {text!r} is not '> x', '< x' or 'in [x, y]'")


def outcome(interval: tuple[float, float], wanted: tuple[float, float]) -> str:
    """Whether all of an interval lies where a rule wants it (holds), none of it (fails) or a part (undecided)."""
    (a, b), (low, high) = interval, wanted
    return "holds" if low <= a and b <= high else "fails" if b < low or a > high else "undecided"


# --- what a text asserts -------------------------------------------------------------------------------------

BRACES = re.compile(r"\{\{(.*?)\}\}", re.S)
ASSERTION = re.compile(r"(?:(\d\d_\w+): )?(\w+)(\(.*?\))?(?: ([<>] \S+|in \[.*?\]|around \S+))?(?: \| (\S+))?")
UNITS = re.compile(r"(^ *[`:]{3}.*\n|^:class:.*\n|^ *- |^ *\d+\. |\n\n)", re.M)  # what parts paragraphs and items
LEADS = {"fails": "**These runs say otherwise.** ", "undecided": "**These runs do not decide this.** ", "holds": ""}


class Assertion(NamedTuple):
    """A statistic with its arguments, what is asserted of it, and how its value is shown."""

    chapter: str
    statistic: str
    arguments: dict[str, Any]
    relation: str
    style: str


class Said(NamedTuple):
    """A text with its values, in Markdown, and a line for each assertion that its tables do not bear out."""

    text: str
    refuted: list[str]


def assertion(text: str, chapter: str) -> Assertion:
    """What stands between double braces; raises `InputError` where that is not `statistic(name=value) rule | format`.

    chapter: whose evidence has the statistic, where the text does not begin with another one (`05_dpo: `).
    """
    match = ASSERTION.fullmatch(" ".join(text.split()))
    if not match:
        raise InputError(f"{{{{{text}}}}} is not 'statistic(name=value) rule | format'")
    of, name, arguments, relation, style = match.groups()
    found = Assertion(of or chapter, name, _arguments(arguments or "()", text), relation or "", style or ".3g")
    try:
        inspect.signature(statistic(found.chapter, found.statistic)).bind("table", **found.arguments)
    except TypeError as error:
        raise InputError(f"{{{{{text}}}}}: {error}") from None
    if relation and not relation.startswith("around"):
        rule(relation, f"{{{{{text}}}}}")
    return found


def _arguments(text: str, where: str) -> dict[str, Any]:
    """`(kind=chosen, kinds=[a, b], epoch=4)` as a dict; a bare word is a text."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return node.id
        return [value(item) for item in node.elts] if isinstance(node, ast.List) else ast.literal_eval(node)

    try:
        call = ast.parse(f"f{text}", mode="eval").body
        return {str(keyword.arg): value(keyword.value) for keyword in call.keywords}  # type: ignore[attr-defined]
    except (SyntaxError, ValueError):
        raise InputError(f"{{{{{where}}}}}: {text} is not (name=value, ...)") from None


def assertions(text: str, chapter: str) -> list[Assertion]:
    """All that a text asserts."""
    return [assertion(match[1], chapter) for match in BRACES.finditer(text)]


def judged(asserted: Assertion, tables: Sequence[pd.DataFrame]) -> tuple[str, str]:
    """The value of an assertion in words, and whether it holds, fails or is undecided."""
    found = values(statistic(asserted.chapter, asserted.statistic), asserted.arguments, tables)
    if not len(found):
        return "(not measured)", "undecided"
    mean, low, high = statistics.mean_interval(found)
    about = asserted.relation.removeprefix("around ")
    if about != asserted.relation:
        result = "holds" if low < float(about) < high else "fails"
    else:
        wanted = rule(asserted.relation, asserted.statistic) if asserted.relation else (-math.inf, math.inf)
        result = outcome((low, high), wanted)
    if asserted.style == "none":
        return "", result
    spread = f" [{low:{asserted.style}}, {high:{asserted.style}}]" if math.isfinite(low) else ""
    return f"{mean:{asserted.style}}{spread}", result


def said(text: str, chapter: str, tables: Tables) -> Said:
    """A text with the values of what it asserts. A paragraph or an item of a list that asserts what its tables do not
    bear out begins with that."""
    refuted = []

    def checked(unit: str) -> str:
        results = []

        def shown(match: re.Match) -> str:
            asserted = assertion(match[1], chapter)
            words, result = judged(asserted, tables(asserted.chapter))
            results.append(result)
            if result != "holds":
                refuted.append(f"{{{{{' '.join(match[1].split())}}}}} {result}: {words or 'see the table'}")
            return words

        filled = BRACES.sub(shown, unit)
        lead = LEADS[next((result for result in LEADS if result in results), "holds")]
        return re.sub(r"^\s*", lambda blank: blank[0] + lead, filled, count=1)

    units = UNITS.split(text)
    return Said("".join(part if n % 2 else checked(part) for n, part in enumerate(units)), refuted)
