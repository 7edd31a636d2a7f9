"""What a piece of code reaches inside this package, definition by definition, without running it.

A result depends on the functions, classes and constants that its code uses, not on the modules in which they stand
beside others. `definitions("lddyn.chapters.sft.run", "finetune")` gives the hash of every one that can be reached by
name, so that a change of anything else leaves the result fresh. Names are followed through imports and attributes of
modules; a module that is handed around as an object counts whole. Docstrings and comments do not count.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The code that brings numbers, or speaks of them, and makes none. Pre-training makes weights, but they come in files:
# all that a run reads are among its inputs (`models.inputs`), and the shipped ones count in a notebook
# (`build.fingerprint`), by content. To train them anew in another way changes no number until the files change. The run
# of `pretrain` itself counts its code.
CARRIERS = tuple(
    f"lddyn.engine.{name}"
    for name in ("alerts", "cache", "gguf", "pool", "pretraining", "progress", "reach", "recorded", "released")
)
BESIDE = {"transformers": "tokenizers"}  # a library that works inside another one, whoever imports it
NUMERICAL = ("numpy", "peft", "scipy", "sklearn", "tokenizers", "torch", "transformers", "trl")


class Module(NamedTuple):
    definitions: dict[str, list[ast.stmt]]  # name: the top-level statements that bind it
    imports: dict[str, str]  # name in this module: what it stands for, dotted
    effects: list[ast.stmt]  # top-level statements that bind nothing, such as calls


def imported(tree: ast.AST) -> dict[str, str]:
    """Names that the import statements in a tree bind, and the dotted names they stand for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = {a.asname: a.name for a in node.names if a.asname}
            names |= whole | {(first := a.name.split(".")[0]): first for a in node.names if not a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same tree, its docstrings removed in place."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return tree


@cache
def parsed(module: str) -> Module | None:
    """A module; None when there is no such module, or none with a source."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    tree, found = without_docstrings(ast.parse(Path(spec.origin).read_text())), Module({}, {}, [])
    for statement in tree.body:
        names = list(_bound(statement))
        for name in names:
            found.definitions.setdefault(name, []).append(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            found.imports.update(imported(statement))
        elif not names:
            found.effects.append(statement)
    return found


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif not isinstance(statement, ast.Import | ast.ImportFrom):
        yield from {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _used(tree: ast.AST, module: str, names: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """What a tree uses, as (module, name) of this package, or (library, None); a whole module is (module, "*")."""
    names = names | imported(tree)
    bases = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name):
            continue
        if node.id not in names:
            yield module, node.id
            continue
        path, above = names[node.id].split("."), bases.get(id(node))
        if path[0] != "lddyn":
            yield path[0], None
            continue
        while above is not None and parsed(".".join(path)):  # an attribute of a module, or of a module in a package
            path, above = [*path, above.attr], bases.get(id(above))
        if parsed(".".join(path)):
            yield ".".join(path), "*"
        else:
            yield ".".join(path[:-1]), path[-1]


def _follow(todo: list[tuple[str, str | None]], own: str = "") -> tuple[dict[str, str], set[str]]:
    """Hashes of all definitions that are reached from some, by dotted name, and the libraries that these use.

    Carriers are not followed, unless it is the module `own`.
    """
    hashes, libraries, done = {}, set(), set()
    while todo:
        module, name = target = todo.pop()
        if target in done:
            continue
        done.add(target)
        if name is None:
            libraries.add(module)
            continue
        found = parsed(module)
        if found is None or (module in CARRIERS and module != own):
            continue
        if name == "*":
            todo += [(module, each) for each in found.definitions]
            continue
        statements = found.definitions.get(name, [])
        if not statements and name in found.imports:  # imported from where it is defined
            *package, last = found.imports[name].split(".")
            todo.append((".".join(package), last) if package else (last, None))
            continue
        if statements and (module, "effects") not in done and found.effects:
            done.add((module, "effects"))
            hashes[f"{module}:effects"] = _digest(found.effects)
            for statement in found.effects:
                todo += _used(statement, module, found.imports)
        if statements:
            hashes[f"{module}.{name}"] = _digest(statements)
            for statement in statements:
                todo += _used(statement, module, found.imports)
    return dict(sorted(hashes.items())), libraries


def _digest(statements: Iterable[ast.stmt]) -> str:
    return hashlib.sha256("\0".join(map(ast.dump, statements)).encode()).hexdigest()[:16]


@cache
def definitions(module: str, name: str) -> dict[str, str]:
    """Hash of a definition and of everything in this package that it reaches; empty when it is not there."""
    return _follow([(module, name)], own=module)[0]


@cache
def versions(module: str, name: str) -> dict[str, str]:
    """Versions of Python and of the numerical libraries that a definition and what it reaches use."""
    return _versions(_follow([(module, name)], own=module)[1])


def of_code(code: str, *more: tuple[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The same two for a text of Python, such as a notebook's, and for further definitions (module, name)."""
    hashes, libraries = _follow([*_used(without_docstrings(ast.parse(code)), "", {}), *more])
    return hashes, _versions(libraries)


def _versions(libraries: set[str]) -> dict[str, str]:
    libraries = libraries | {BESIDE[name] for name in libraries & BESIDE.keys()}
    found = {
        name: importlib.metadata.version("scikit-learn" if name == "sklearn" else name)
        for name in NUMERICAL
        if name in libraries
    }
    return {"python": ".".join(platform.python_version_tuple()[:2])} | found
