"""Build the book: execute what is stale, write the generated pages, render strictly."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from filelock import FileLock, Timeout

from lddyn import InputError, unknown
from lddyn.chapters import claims, sentences
from lddyn.data import preferences
from lddyn.engine import pool, pretraining, reach, recorded, settings, store
from lddyn.publish import display, notebooks, pages

SCALES = ("smoke", "laptop", "paper")
SHIPPED = {  # data of this package, and the definition that code which reads them reaches
    "lddyn.data.preferences.BUILTIN": preferences.BUILTIN,
    "lddyn.data.preferences.PLAUSIBLE": preferences.PLAUSIBLE,
    "lddyn.engine.models.builtin": pretraining.SHIPPED,
}


def fingerprint(notebook: Path, scale: str) -> str:
    """Hash of all that decides what an executed notebook shows: its source, scale and rules, the code that they reach,
    the libraries, the data of this package, and what is recorded of the chapter: runs, and logs of the authors."""
    rules, (code, versions) = claims.of_chapter(notebook.stem), reached(notebook)
    kept = recorded.hashes(notebook.stem), [claims.of_logs(rule) for rule in rules]
    parts = [notebook.read_text(), scale, *map(json.dumps, (rules, code, versions, _shipped(code), kept))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def reached(notebook: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of what the cells of a notebook and the statistics that it names reach, and the versions of libraries."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    rules = claims.of_chapter(notebook.stem)
    measured = [part for rule in rules for part in claims.parts(rule) if part["chapter"] == notebook.stem]
    texts = [(code, notebook.stem), *((rule.get("why", ""), rule["chapter"]) for rule in rules)]
    asserted = [one for text, chapter in texts for one in sentences.assertions(text, chapter)]
    named = [(part["chapter"], part["statistic"]) for part in measured] + [one[:2] for one in asserted]
    judged = [sentences.statistic(*name) for name in named if name[0] == notebook.stem]
    return reach.of_code(code, *((f.__module__, f.__name__) for f in judged))


def _shipped(code: Collection[str]) -> dict[str, str]:
    """Hashes of the files of `SHIPPED` that these definitions read: the built-in data and models count by content."""
    places = [place for name, place in SHIPPED.items() if name in code]
    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return {str(file.relative_to(store.PACKAGE)): store.file_hash(file) for file in files if file.is_file()}


def execute(scale: str, force: bool) -> list[str]:
    """Execute every stale notebook into the book; returns one line for each failure, and goes on after it."""
    places = {name: pages.EXECUTED / f"{name}.ipynb" for name in pages.chapters()}
    now = {name: fingerprint(notebooks.notebook_path(name), scale) for name in places}
    stale = [name for name, out in places.items() if force or _metadata(out).get("fingerprint") != now[name]]
    if stale:
        of = notebooks.expected(stale, scale)
        chapters = f"{len(stale)} of {len(places)} chapters to run at scale {scale}"
        print(f"lddyn: {chapters}: {of} here, less where runs are cached", flush=True)
        compute(stale, scale, of)
    for name in places.keys() - set(stale):
        print(f"lddyn: {name} is fresh")
    with pool.processes(2) as executor:  # the runs are there: these read, draw and think
        waiting = {name: executor.submit(_execute, name, places[name], scale, now[name]) for name in stale}
        failures = [f"{name}: {problem}" for name, future in waiting.items() if (problem := future.result())]
    return failures


def compute(names: Collection[str], scale: str, of: str) -> None:
    """Compute the runs of these chapters side by side in one pool, chapters that take long first.

    What fails here fails again in its notebook, which says where. of: the time that is expected, in words.
    """
    began, clock, seconds = store.now(), time.perf_counter(), notebooks.times()["seconds"].get(scale, {})
    count = itertools.count(1)

    def told(run: store.Run) -> None:
        number = next(count)
        if run.manifest["finished"] >= began:
            minutes, took = (time.perf_counter() - clock) / 60, run.manifest["seconds"]
            print(f"lddyn: {minutes:.1f} min of {of}: run {number}, {run.folder.name}, {took:.0f} s", flush=True)

    def chapter(name: str, executor: Executor) -> None:
        run = import_module(f"lddyn.chapters.{sentences.room(name)}.run")
        with contextlib.suppress(Exception):
            run.runs(run.settings(scale, {}), executor=executor, done=told)

    with pool.processes(os.cpu_count() or 1) as executor, ThreadPoolExecutor(len(names)) as threads:
        for name in sorted(names, key=lambda name: -seconds.get(name, 0)):
            threads.submit(chapter, name, executor)


def _execute(name: str, out: Path, scale: str, fingerprint: str) -> str | None:
    """Execute one notebook and stamp it; what went wrong, or None."""
    source, clock = notebooks.notebook_path(name), time.perf_counter()
    store.writable(out)
    try:
        problem = notebooks.execute(source, notebooks.checked(source, {"scale": scale}), out)
    except InputError as error:
        problem = str(error)
    if not problem and (problem := notebooks.noise(out)):
        failed = out.with_suffix(".failed.ipynb")
        out.replace(failed)
        problem += f" (notebook: {failed})"
    if not problem:
        seconds = round(time.perf_counter() - clock, 1)
        _stamp(out, {"fingerprint": fingerprint, "scale": scale, "seconds": seconds})
        print(f"lddyn: {name} took {seconds} s", flush=True)
    return problem


def _metadata(path: Path) -> dict:
    try:
        return json.loads(path.read_text())["metadata"].get("lddyn", {})
    except (OSError, ValueError, KeyError):
        return {}


def _stamp(path: Path, entry: dict) -> None:
    """Note in an executed notebook what it was made from, and arrange for the page what a reader does not need."""
    notebook = json.loads(path.read_text())
    notebook["metadata"]["lddyn"] = entry
    notebook["metadata"].pop("papermill", None)  # paths of this machine
    for cell in notebook["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("remove-cell")
        cell["metadata"].pop("papermill", None)
    (place,) = (n for n, c in enumerate(notebook["cells"]) if "parameters" in c["metadata"].get("tags", []))
    notebook["cells"][place]["metadata"]["tags"].append("hide-input")
    table = {"cell_type": "markdown", "id": "parameters-table", "metadata": {}}
    notebook["cells"].insert(place, table | {"source": table_of(notebooks.parameters(path).values())})
    store.write_json(path, notebook)


def table_of(parameters: Iterable[settings.Parameter]) -> str:
    """A table of parameters for the page, above the cell that declares them and folded as that is: Markdown."""
    rows, by_scale = [], "; none: by scale"
    for p in parameters:
        default = "by scale" if p.help.endswith(by_scale) else f"`{p.default!r}`"
        takes = p.allowed if p.allowed.startswith("{") else f"{p.type} {p.allowed}".strip()
        rows.append((f"`{p.name}`", default, f"`{takes}`", p.help.removesuffix(by_scale).replace("|", r"\|")))
    table = claims.markdown_table(("parameter", "default", "range", "meaning"), rows)
    return f"```{{dropdown}} {len(rows)} parameters: name, default, range, meaning\n{table}\n```"


# --- rendering ---------------------------------------------------------------------------------------------


def build(scale: str, force: bool = False, strict: bool = False) -> int:
    """What `make book` does. Returns the exit code: 0, or 1 when a notebook failed or the renderer warned.

    With `strict` also 1 where a text says what its table does not (`refuted`), which is printed anyhow. A second build
    waits for the first, and then finds everything fresh.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if not store.CLONE:
        raise InputError("the book needs a clone of the repository; the package alone runs notebooks: lddyn run NAME")
    store.writable(pages.GENERATED / "status.md")
    lock = FileLock(pages.GENERATED / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print("lddyn: another build of this book is running; waiting for it")
        held = lock.acquire()
    with held:
        return _build(scale, force, strict)


def _build(scale: str, force: bool, strict: bool) -> int:
    failures = execute(scale, force)
    if failures:
        for line in failures:
            print(f"lddyn: {line}", file=sys.stderr)
        return 1
    print("lddyn: drawing and rendering the pages, a minute or two", flush=True)
    shown = pages.published()
    pages.write_under_figures(shown)
    pages.write_hero(shown)
    pages.write_across(shown)
    pages.write_chapters(shown)
    pages.write_citation()
    entries = claims.verdicts(shown)
    pages.write_scorecard(entries)
    on_first_page = pages.write_found(entries)
    pages.write_paper_scale(shown)
    pages.write_status()
    pages.write_data_card()
    pages.write_model_card()
    pages.write_bench()
    pages.write_sweeps()
    pages.write_preflight()
    if wrong := [*on_first_page, *refuted(entries, scale)]:
        print(*(f"lddyn: not borne out: {line}" for line in wrong), sep="\n", file=sys.stderr)
    return render() or (1 if strict and wrong else 0)


def refuted(entries: Iterable[Mapping], scale: str) -> list[str]:
    """What the texts of the pages assert of runs at this scale, or of recorded ones, and their tables do not bear out.

    entries: all claims, judged. Their reasons (`why`) are about runs at laptop scale, where each verdict other than
    *replicated* needs one.
    """
    wrong = []
    for name in pages.chapters():
        cells = json.loads((pages.EXECUTED / f"{name}.ipynb").read_text())["cells"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        wrong += [f"{name}: {line}" for data in outputs for line in data.get(display.REFUTED, [])]
    for entry in entries if scale == "laptop" else []:
        where = f"{claims.LEDGER.name}, claim {entry['id']}"
        if entry["verdict"] not in ("replicated", "not attempted"):
            wrong += [f"{where}: {line}" for line in entry["refuted"]]
            if not entry["why"] and not entry["refuted"]:
                wrong.append(f"{where} is {entry['verdict']}, and has no why")
    return wrong


def jupyter_book(*options: str) -> subprocess.CompletedProcess:
    """Let Jupyter Book build all pages; what it printed is in the result."""
    start = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    return subprocess.run([*start, "build", str(pages.BOOK), "--all", *options], capture_output=True, text=True)


def render() -> int:
    """Render the pages with Jupyter Book, warnings as errors; nothing is left over from an earlier build."""
    index = pages.BOOK / "_build" / "html" / "index.html"
    shutil.rmtree(index.parent, ignore_errors=True)
    done = jupyter_book("-W", "-n", "--keep-going")
    if done.returncode or not index.exists():
        lines = (done.stdout + done.stderr).splitlines()
        told = [line for line in lines if re.search("WARNING|ERROR|Error", line)] or lines[-20:]
        print(*told, "lddyn: the book did not build without warnings", sep="\n", file=sys.stderr)
        return 1
    print(index)
    return 0
