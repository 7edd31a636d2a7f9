"""Run a notebook with parameters that were checked before anything started.

A notebook's cell tagged `parameters` is its interface (`lddyn.engine.settings`).
"""

import contextlib
import json
import logging
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lddyn import InputError, unknown
from lddyn.engine import settings, store
from lddyn.engine.store import ROOT
from lddyn.workshop import estimate

NOTEBOOKS = store.SOURCES / "notebooks"


def notebook_path(name: str) -> Path:
    """The source of a notebook, by name or path; raise `InputError` with the nearest name when there is none."""
    path = Path(name) if name.endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        raise unknown("notebook", name, sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
    return path


def parameters(notebook: Path) -> dict[str, settings.Parameter]:
    """Read the parameters cell of a notebook; raise `InputError` when it has none or a line is malformed."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{notebook} is not a notebook ({error})") from error
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{notebook} has {len(tagged)} cells tagged 'parameters', not one")
    return settings.read_cell("".join(tagged[0]["source"]), f"{notebook}: parameters cell")


def checked(notebook: Path, values: Mapping[str, object]) -> dict[str, object]:
    """Values as Python objects, names, types and ranges checked; `InputError` names the first that is wrong."""
    return settings.parse_all(parameters(notebook), values, notebook.stem)


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
        with contextlib.nullcontext() if sys.stderr.isatty() else _telling(notebook.stem, running):
            papermill.execute_notebook(
                _literal(notebook),
                _literal(running),
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


@contextlib.contextmanager
def _telling(name: str, running: Path, every: float = 60.0) -> Iterator[None]:
    """Say on stderr, once in `every` seconds, how many cells of a notebook that papermill executes are done."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(every):
            with contextlib.suppress(OSError, ValueError):  # it is being written
                cells = [c for c in json.loads(running.read_text())["cells"] if c["cell_type"] == "code"]
                done = sum(c["metadata"].get("papermill", {}).get("status") == "completed" for c in cells)
                minutes = (time.monotonic() - began) / 60
                print(f"lddyn: {name}: {done} of {len(cells)} cells, {minutes:.1f} min", file=sys.stderr, flush=True)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def times() -> dict[str, Any]:
    """Seconds of each chapter with all its runs, by scale, and the matrix rate of that machine: `seconds, gflops`."""
    return json.loads((store.BOOK / "times.json").read_text())


def expected(names: Iterable[str], scale: str) -> str:
    """How long these chapters take here: times on another machine (`times`), scaled by both matrix rates."""
    recorded = times()
    if scale not in recorded["seconds"]:
        return "hours to days"
    rate = estimate.measured_rate("cpu", bf16=False) / 1e9
    minutes = sum(recorded["seconds"][scale].get(name, 60) for name in names) * recorded["gflops"] / rate / 60
    return f"about {max(minutes, 1):.0f} min"


def _literal(path: Path) -> str:
    """A path as papermill takes it: braces are templates to it."""
    return str(path).replace("{", "{{").replace("}", "}}")


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
    values = settings.read_yaml(params) if params else {}
    values |= {"scale": scale} if scale else {}
    values |= dict(words)
    values = checked(source, values)
    out = out or ROOT / "book" / "notebooks" / f"{source.stem}.ipynb"
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the notebook itself; choose another file")
    store.writable(out)
    if source.parent == NOTEBOOKS:
        how = values.get("scale") or parameters(source)["scale"].default
        time_here = f"{expected([source.stem], how)} here with its defaults, less where runs are cached"
        print(f"lddyn: {source.stem} at scale {how}: {time_here}", file=sys.stderr, flush=True)
    problem = execute(source, values, out, timeout)
    if problem:
        print(f"lddyn: {source.stem}: {problem}", file=sys.stderr)
        return 1
    print(shlex.quote(str(out)))
    return 0
