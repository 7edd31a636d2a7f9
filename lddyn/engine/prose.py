"""English prose from the documentation strings of the installed libraries, for pre-training the built-in model.

The strings are read from the source files and never imported or executed. Which text comes out depends on the
installed versions only, so these are the parameters of the run and the text's hash is in every manifest that uses it.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from lddyn.engine import cache, store
from lddyn.engine.store import long

LIBRARIES = {  # import name: name of the distribution; all come with the base installation
    "python": "",  # has none
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "seaborn": "seaborn",
    "networkx": "networkx",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
# Tests, vendored copies, other people's packages, and the copies of one text in every model of transformers.
SKIPPED = {"test", "tests", "testing", "site-packages", "externals", "idlelib", "lib2to3", "ensurepip", "models"}
COMMON = re.compile(
    r"\b(?:the|a|an|of|to|in|is|and|that|for|it|be|as|are|with|this|by|on|or|if|which|not|can|from|will|when|at|has|have|was|"
    r"but|its|should|may|there|than|then|you|all|only)\b",
    re.IGNORECASE,
)
MARKUP = re.compile(r"[\\|{}<>#@^~]|--|\.\.\.|::|%s|https?:|Copyright|[Ll]icens")


def versions(libraries: Sequence[str] = tuple(LIBRARIES)) -> dict[str, str]:
    """Name and version of those of `libraries` that are installed, in this order: the parameters of `collect`."""
    found = {}
    for name in libraries:
        if name == "python":
            found[name] = platform.python_version()
        elif importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(LIBRARIES[name])
    return found


def run(libraries: Mapping[str, str]) -> store.Run:
    """The cached run of `collect`; its folder holds `prose.txt`."""
    return cache.run(collect, {"libraries": dict(libraries)})


def documents(libraries: Mapping[str, str]) -> list[str]:
    """The prose of each documentation string, paragraphs separated by newlines, in a fixed order."""
    return (run(libraries).folder / "prose.txt").read_text(encoding="utf-8").strip().split("\n\n")


def collect(work: Path, libraries: Mapping[str, str]) -> pd.DataFrame:
    """Write `prose.txt`: one paragraph a line, an empty line between documentation strings. About 13 s.

    Returns a long table with the number of paragraphs and characters by library.
    """
    seen: set[str] = set()
    text, rows = [], []
    gc.disable()  # syntax trees hold no cycles, and looking for some would take a third of the time
    try:
        for name in libraries:
            kept = [prose for string in strings(name) if (prose := _new(paragraphs(string), seen))]
            text += ["\n".join(prose) for prose in kept]
            rows.append((0, 0, name, "prose", "paragraphs", sum(map(len, kept))))
            rows.append((0, 0, name, "prose", "characters", sum(len(p) for prose in kept for p in prose)))
    finally:
        gc.enable()
    (work.parent / "prose.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8", newline="\n")
    return long(rows)


def _new(prose: Iterator[str], seen: set[str]) -> list[str]:
    """Those paragraphs of which more than 60% was not seen before, sentence by sentence."""
    new = []
    for paragraph in prose:
        sentences = re.split(r"(?<=[.?!]) (?=[A-Z])", paragraph)
        if sum(len(s) for s in sentences if s not in seen) > 0.6 * len(paragraph):
            new.append(paragraph)
        seen.update(sentences)
    return new


def strings(library: str) -> Iterator[str]:
    """Documentation strings of a library, and the strings of module-level statements that attach or collect some."""
    if library == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(library)
        assert spec and spec.submodule_search_locations, library
        root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if any(f in SKIPPED or (f.startswith("_") and f != "_core") for f in folders):
            continue
        source = path.read_bytes()
        if source.count(b'"""') < 4:
            continue
        try:
            todo: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [ast.parse(source)]
        except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
            continue
        while todo:
            node = todo.pop(0)
            for statement in node.body:
                if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    todo.append(statement)
                elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    yield from _text(statement.value)
                elif isinstance(node, ast.Module) and isinstance(statement, ast.Expr | ast.Assign):
                    for part in ast.walk(statement):
                        yield from _text(part)


def _text(node: ast.AST) -> Iterator[str]:
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    if isinstance(value, str) and len(value) >= 60 and value.isascii():
        yield value


def paragraphs(string: str) -> Iterator[str]:
    """Paragraphs of prose in a documentation string, each on one line, the markup of names removed.

    A paragraph is a run of lines with the same indentation, which tells descriptions from the names that they describe.
    """
    lines: list[str] = []
    indentation: int | None = None
    for number, line in enumerate([*string.expandtabs().split("\n"), ""]):
        words = line.strip()
        here = len(line) - len(line.lstrip()) if number else None  # the first line stands behind the quotes
        if lines and (not words or indentation not in (here, None) or words[:2] in ("- ", "* ")):
            if lines[0][0].isupper() and lines[-1][-1] in ".?!" and is_prose(text := _plain(" ".join(lines))):
                yield text
            lines = []
        if words:
            lines.append(words)
            indentation = here


def _plain(text: str) -> str:
    if "`" in text:
        text = re.sub(r":[a-z:]+:`[~!]?([^`<]*?)(?:\s*<[^>]*>)?`", r"\1", text)
        text = re.sub(r"``?([^`]*)``?_{0,2}", r"\1", text)
    if "*" in text:
        text = re.sub(r"\*\*?([^*\s][^*]*)\*\*?", r"\1", text)
    if "]_" in text:
        text = re.sub(r" ?\[[^\]]*\]_", "", text)
    return " ".join(text.split())


def is_prose(text: str) -> bool:
    """10 to 160 words, three quarters of the characters in words, a quarter of the words common, no markup left."""
    if not 10 <= len(text.split()) <= 160 or MARKUP.search(text):
        return False
    words = re.findall(r"[A-Za-z][a-z']*", text)
    return sum(map(len, words)) >= 0.76 * len(text) and len(COMMON.findall(text)) >= len(words) / 4
