"""Settings: frozen dataclasses that are passed whole; parameters that are checked before anything starts.

A chapter's settings are a frozen dataclass made by `choose` from a scale and what a notebook gives; those of a run are
another one, derived from it by `derive`.

One plain assignment a line, in a notebook's cell tagged `parameters` or in `launch`:

    lr: float | None = None  # (0, 10] learning rate; None: by scale

with a type, a default and a comment that may open with what is allowed: a range `[low, high]`, `(low, high]`, or a
choice `{a, b}`.
"""

import ast
import io
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from lddyn import InputError, unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def choose(cls: type[S], scales: Mapping[str, Mapping[str, object]], scale: str, given: Mapping[str, object]) -> S:
    """The settings that a scale stands for, with those of `given` in their place that are fields of `cls` and not None.

    `cls` is a frozen dataclass. `given` may hold other names too, such as a notebook's globals. Raises `InputError` for
    an unknown scale.
    """
    if scale not in scales:
        raise unknown("scale", scale, scales)
    mine = {f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None}
    return derive(cls, **{**scales[scale], **mine})


def derive(cls: type[S], *sources: object, **values: object) -> S:
    """An instance of the frozen dataclass `cls`: each field from `values`, or from the last of `sources` that has it.

    `sources` are instances of other dataclasses. A field that none of them has takes its default.
    """
    names = {f.name for f in fields(cls)}
    found = {name: getattr(source, name) for source in sources for name in names if hasattr(source, name)}
    return cls(**found | {name: value for name, value in values.items() if name in names})


def lengths(settings: Any) -> dict[str, Any]:
    """Where prompts and responses are cut, in tokens, and how they are rendered: keywords of `ProbeSet.encode`."""
    return {name: getattr(settings, name) for name in ("max_prompt", "max_response", "format")}


TYPES = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: its type (`int`, `list[str]`, ...), default, what is allowed, and its comment."""

    name: str
    type: str
    optional: bool
    default: object
    allowed: str  # "", "[1, 10]" or "{a, b}"
    help: str

    def describe(self) -> str:
        kind = self.type + (" or none" if self.optional else "")
        return f"{kind} {'in' if self.allowed[:1] in '[(' else 'one of'} {self.allowed}" if self.allowed else kind

    def parse(self, value: object) -> object:
        """Turn a word from the command line or a YAML value into a checked value; raise `InputError`."""
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if self.optional:
                return None
            raise self.wrong(value)
        if self.type.startswith("list["):
            words = value if isinstance(value, list) else [w.strip() for w in str(value).strip("[]").split(",") if w]
            return [self.item(word, self.type[5:-1]) for word in words]
        return self.item(value, self.type)

    def item(self, value: object, kind: str) -> object:
        try:
            if kind == "bool":
                result = value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
            elif isinstance(value, bool) or (kind != "str" and not isinstance(value, str | int | float)):
                raise ValueError
            else:
                result = TYPES[kind](str(value) if kind == "int" else value)
        except (ValueError, KeyError) as error:
            raise self.wrong(value) from error
        if not self.allows(result):
            raise self.wrong(value)
        return result

    def allows(self, value: Any) -> bool:
        if not self.allowed:
            return True
        inside = [word.strip() for word in self.allowed[1:-1].split(",")]
        if self.allowed[0] == "{":
            return str(value) in inside
        low, high = map(float, inside)
        above: bool = value >= low if self.allowed[0] == "[" else value > low
        return above and (value <= high if self.allowed[-1] == "]" else value < high)

    def wrong(self, value: object) -> InputError:
        return InputError(f"parameter {self.name} takes {self.describe()}, not {value!r}")


def read_cell(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that lines of `name: type = default  # [allowed] comment` declare."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            raise InputError(f"{where}, line {node.lineno}: expected `name: type = default  # comment`")
        kind = ast.unparse(node.annotation)
        comment = comments.get(node.end_lineno or 0, "")
        allowed = re.match(r"[\[({][^\])}]*[\])}]", comment)
        found[node.target.id] = Parameter(
            name=node.target.id,
            type=kind.removesuffix(" | None"),
            optional=kind.endswith(" | None"),
            default=ast.literal_eval(node.value),
            allowed=allowed[0] if allowed else "",
            help=comment[allowed.end() if allowed else 0 :].strip(),
        )
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a parameter file. (YAML takes `5e-7` for text; the parameter's type mends that.)"""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read parameters from {path}: it is not UTF-8 ({error.reason})") from error
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read parameters from {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map parameter names to values")
    return content


def parse_all(known: Mapping[str, Parameter], values: Mapping[str, object], whose: str) -> dict[str, object]:
    """Values as Python objects; `InputError` names the first that is unknown or wrong."""
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {whose}", name, known)
    return {name: known[name].parse(value) for name, value in values.items()}
