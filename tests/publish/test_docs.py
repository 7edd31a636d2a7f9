"""What the pages say about the code: a file, a module or a function that has moved must not be named any more."""

import re
from pkgutil import resolve_name

import pytest

from lddyn.__main__ import COMMANDS
from lddyn.engine.store import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
PAGES += [*sorted((ROOT / "book" / "templates").glob("*.md")), ROOT / "book" / "claims.yml"]
ROOMS = dict.fromkeys(("influence", "losses", "kernels", "first_order", "logprobs", "softmax"), "theory")
ROOMS |= {"statistics": "chapters", "responses": "data"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_on_a_page_are_there(page):
    called = re.findall(r"(?:^    |`|-m )lddyn ([a-z]+)", page.read_text(), re.M)
    assert set(called) <= COMMANDS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    files = re.findall(r"\b(?:lddyn|tests|book|notebooks)/[\w/.-]+\.(?:py|yml|md|ipynb|json|sh)\b", text)
    made = ("_build", "generated", "NN_name", "test_name")
    assert not [name for name in files if not (ROOT / name).exists() and not any(part in name for part in made)]
    for module, name in re.findall(r"from (lddyn[\w.]*) import (\w+)", text):
        resolve_name(f"{module}.{name}")
    for name in re.findall(r"`(lddyn\.[\w.]+)`", text):
        resolve_name(name)
    for module, name in re.findall(rf"`({'|'.join(ROOMS)})\.(\w+)", text):
        resolve_name(f"lddyn.{ROOMS[module]}.{module}.{name}")
