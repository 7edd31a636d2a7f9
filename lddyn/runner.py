"""Run a notebook with parameters that were checked before anything started.

A notebook's cell tagged `parameters` is its interface: one plain assignment a line,

    lr: float | None = None  # (0, 10] learning rate; None: by scale

with a type, a default and a comment that may open with what is allowed: a range `[low, high]`, `(low, high]`, or a
choice `{a, b}`.
"""

import ast
import io
import json
import logging
import re
import shlex
import sys
import tempfile
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lddyn import InputError, unknown
from lddyn.records import ROOT

NOTEBOOKS = ROOT / "notebooks"
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
                result = int(str(value)) if kind == "int" else TYPES[kind](value)
        except (ValueError, KeyError) as error:
            raise self.wrong(value) from error
        if not self.allows(result):
            raise self.wrong(value)
        return result

    def allows(self, value: object) -> bool:
        if not self.allowed:
            return True
        inside = [word.strip() for word in self.allowed[1:-1].split(",")]
        if self.allowed[0] == "{":
            return str(value) in inside
        low, high = map(float, inside)
        above = value >= low if self.allowed[0] == "[" else value > low
        return above and (value <= high if self.allowed[-1] == "]" else value < high)

    def wrong(self, value: object) -> InputError:
        return InputError(f"parameter {self.name} takes {self.describe()}, not {value!r}")


def notebook_path(name: str) -> Path:
    """The source of a notebook, by name or path; raise `InputError` with the nearest name when there is none."""
    path = Path(name) if name.endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        raise unknown("notebook", name, sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
    return path


def parameters(notebook: Path) -> dict[str, Parameter]:
    """Read the parameters cell of a notebook; raise `InputError` when it has none or a line is malformed."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{notebook} is not a notebook ({error})") from error
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{notebook} has {len(tagged)} cells tagged 'parameters', not one")
    return read_cell("".join(tagged[0]["source"]), f"{notebook}: parameters cell")


def read_cell(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that lines of `name: type = default  # [allowed] comment` declare."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.AnnAssign):
            raise InputError(f"{where}, line {node.lineno}: expected `name: type = default  # comment`")
        kind = ast.unparse(node.annotation)
        comment = comments.get(node.end_lineno, "")
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


def read_yaml(path: Path) -> dict:
    """Read a parameter file. (YAML takes `5e-7` for text; the parameter's type mends that.)"""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read parameters from {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map parameter names to values")
    return content


def checked(notebook: Path, values: Mapping[str, object]) -> dict[str, object]:
    """Values as Python objects, names, types and ranges checked; `InputError` names the first that is wrong."""
    return parse_all(parameters(notebook), values, notebook.stem)


def parse_all(known: Mapping[str, Parameter], values: Mapping[str, object], whose: str) -> dict[str, object]:
    """Values as Python objects; `InputError` names the first that is unknown or wrong."""
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {whose}", name, known)
    return {name: known[name].parse(value) for name, value in values.items()}


def writable(path: Path) -> None:
    """Raise `InputError` when a file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise InputError(f"cannot write the notebook to {path}: {error.strerror}") from error


def execute(notebook: Path, values: Mapping[str, object], out: Path, timeout: int | None = None) -> str | None:
    """Execute a notebook with already checked values into `out`. Returns None, or one line saying what failed.

    What an earlier success left in `out` is replaced only by a new success; a failure leaves its partial
    notebook beside it as `<name>.failed.ipynb`. Raises `InputError` where the notebook did.
    """
    import papermill
    from traitlets.config import Config

    # it warns about parameters whose types it cannot read; `checked` has read them
    logging.getLogger("papermill").setLevel(logging.ERROR)
    running, failed = out.with_suffix(".running.ipynb"), out.with_suffix(".failed.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            dict(values),
            cwd=str(ROOT),
            kernel_name="python3",
            progress_bar=sys.stderr.isatty() and {"desc": notebook.stem},
            execution_timeout=timeout,
            # ipykernel 7 warns about plain TCP for every kernel otherwise
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
    except Exception as error:  # papermill raises its own, nbclient's and the kernel's errors
        if running.exists():
            running.replace(failed)
        if getattr(error, "ename", None) == InputError.__name__:  # such as a model that is not there
            raise InputError(error.evalue.splitlines()[0]) from error
        return f"{_failing_cell(failed, error)} (partial notebook: {failed})"
    running.replace(out)
    failed.unlink(missing_ok=True)
    return None


def noise(path: Path) -> str | None:
    """What a page must not show and an executed notebook holds, as one line; None where there is nothing.

    Output on stderr, a warning, a path of this machine.
    """
    places = {sys.prefix, str(ROOT), str(Path.home())} - {"/"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"], 1):
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", ""))
            text += "".join("".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))
            where = f"cell {number} holds"
            if output.get("name") == "stderr":
                return f"{where} output on stderr: {text.strip().splitlines()[0]}"
            if found := re.search(r"^.*\w+Warning: .*$", text, re.M):
                return f"{where} a warning: {found[0].strip()}"
            if found := next((place for place in places if place in text), None):
                return f"{where} a path of this machine: {found}"
    return None


def _failing_cell(path: Path, error: Exception) -> str:
    """Name the cell that failed and the last line of its error."""
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    message = f"{type(error).__name__}: {last}"
    if getattr(error, "ename", None):
        message = f"{error.ename}: {error.evalue.splitlines()[0] if error.evalue else ''}"
    index = getattr(error, "exec_count", None)
    if index is None and path.exists():
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        states = [c["metadata"].get("papermill", {}).get("status") for c in cells]
        index = next((i + 1 for i, s in enumerate(states) if s != "completed"), None)
    return f"cell {index} failed: {message}" if index else message


def run(
    name: str,
    words: list[tuple[str, str]],
    scale: str | None,
    params: Path | None,
    out: Path | None,
    timeout=None,
):
    """What `python -m lddyn run` does. Returns the exit code; raises `InputError` before anything starts."""
    source = notebook_path(name)
    values = read_yaml(params) if params else {}
    values |= {"scale": scale} if scale else {}
    values |= dict(words)
    values = checked(source, values)
    out = out or ROOT / "book" / "notebooks" / f"{source.stem}.ipynb"
    writable(out)
    problem = execute(source, values, out, timeout)
    if problem:
        print(f"lddyn: {source.stem}: {problem}", file=sys.stderr)
        return 1
    print(shlex.quote(str(out)))
    return 0
