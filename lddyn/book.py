"""Build the book: execute what is stale, write the generated pages, render strictly."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path

import yaml
from docutils.nodes import make_id
from filelock import FileLock, Timeout

from lddyn import InputError, bench, claims, display, estimate, figures, preferences, records, runner, unknown

BOOK = records.ROOT / "book"
EXECUTED = BOOK / "notebooks"
GENERATED = BOOK / "generated"
SCALES = ("smoke", "laptop", "paper")


def chapters() -> list[str]:
    """The notebooks in the order of the table of contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [Path(f).stem for f in files if f.startswith("notebooks/")]


def fingerprint(notebook: Path, scale: str) -> str:
    """Hash of all that decides what an executed notebook shows: its source, scale, rules, code and library versions."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    reached = sorted(name for name in records.imports(ast.parse(code)) if name.startswith("lddyn."))
    parts = [notebook.read_text(), scale, claims.LEDGER.read_text()]
    parts += [f"{records.code_hashes(name)} {records.versions(name)}" for name in reached]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def execute(scale: str, force: bool) -> list[str]:
    """Execute every stale notebook into the book; returns one line for each failure, and goes on after it."""
    failures, places = [], {name: EXECUTED / f"{name}.ipynb" for name in chapters()}
    now = {name: fingerprint(runner.notebook_path(name), scale) for name in places}
    stale = [name for name, out in places.items() if force or _metadata(out).get("fingerprint") != now[name]]
    if stale:
        print(
            f"lddyn: {len(stale)} of {len(places)} chapters to run at scale {scale}, {expected(stale, scale)}",
            flush=True,
        )
    for name, out in places.items():
        if name not in stale:
            print(f"lddyn: {name} is fresh")
        elif problem := _execute(name, out, scale, now[name]):
            failures.append(f"{name}: {problem}")
    return failures


def expected(names: Iterable[str], scale: str) -> str:
    """How long these chapters take here: times on another machine (`book/times.json`), scaled by both matrix rates."""
    recorded = json.loads((BOOK / "times.json").read_text())
    if scale not in recorded["seconds"]:
        return "which takes a GPU hours to days"
    rate = estimate.measured_rate("cpu", bf16=False) / 1e9
    minutes = sum(recorded["seconds"][scale][name] for name in names) * recorded["gflops"] / rate / 60
    return f"about {max(minutes, 1):.0f} min here ({rate:.0f} GFLOP/s), less where runs are cached"


def _execute(name: str, out: Path, scale: str, fingerprint: str) -> str | None:
    """Execute one notebook and stamp it; what went wrong, or None."""
    source, clock = runner.notebook_path(name), time.perf_counter()
    runner.writable(out)
    try:
        problem = runner.execute(source, runner.checked(source, {"scale": scale}), out)
    except InputError as error:
        problem = str(error)
    if not problem and (problem := runner.noise(out)):
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
    notebook = json.loads(path.read_text())
    notebook["metadata"]["lddyn"] = entry
    notebook["metadata"].pop("papermill", None)  # paths of this machine
    for cell in notebook["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("remove-cell")
        cell["metadata"].pop("papermill", None)
    records.write_json(path, notebook)


def published() -> dict[str, dict]:
    """What the executed notebooks show: chapter -> scale and runs. A chapter whose runs are gone is left out."""
    found = {}
    for path in sorted(EXECUTED.glob("*.ipynb")):
        if path.stem.endswith((".failed", ".running")):
            continue
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                bundle = output.get("data", {}).get(display.BUNDLE)
                if bundle:
                    runs = [records.runs_root() / name for name in bundle["runs"]]
                    if all((folder / "table.parquet").exists() for folder in runs):
                        found[bundle["chapter"]] = {
                            "scale": bundle["scale"],
                            "runs": [records.load(folder) for folder in runs],
                        }
    return found


# --- generated pages ---------------------------------------------------------------------------------------


def write_hero(shown: dict[str, dict]) -> None:
    """The figure of the first page."""
    figures.use_style()
    digits, sft = (records.frame(shown[chapter]["runs"]) for chapter in ("01_mnist", "03_sft"))
    figure = figures.hero(digits, sft)
    GENERATED.mkdir(parents=True, exist_ok=True)
    records.write_atomically(
        GENERATED / "hero.svg", lambda p: figure.savefig(p, format="svg", metadata={"Date": None}, bbox_inches="tight")
    )


def write_scorecard(entries: list[dict]) -> None:
    """The page with every claim and its verdict, and a summary of them."""
    by_verdict = {v: [e for e in entries if e["verdict"] == v] for v in claims.VERDICTS}
    counts = ", ".join(f"{len(those)} {v}" for v, those in by_verdict.items())
    scales = ", ".join(sorted({e["scale"] for e in entries if e["scale"]})) or "none"
    summary = "\n".join(f"| {v} | {len(those)} | {_numbers(those)} |" for v, those in by_verdict.items())
    page = f"""---
html_theme.sidebar_secondary.remove: true
---

# Scorecard

Every claim of the paper that a number can check ({len(entries)} of them): the paper's value, the value in the logs that
the authors released where there is one, and this companion's value over seeds with its 95% interval and the rule
that decides. {counts}; scale: {scales}.

| verdict | claims | numbers |
|---|---|---|
{summary}

**How a verdict comes about.** A claim has parts; each is a statistic of one run, a rule, and the interval of
the statistic over seeds. A part *holds* when the whole interval satisfies the rule, *fails* when none of it does, and
is *undecided* otherwise. *Replicated*: every part holds; *partly*: some do; *not replicated*: none does. The rules are
in `book/claims.yml` and were written before the reported seeds were run; a negative verdict stays here, with the reason
as far as it is known. What these verdicts are about: a model of half a million parameters that is pre-trained on
the spot, and digits, on two processor cores. A claim that fails here may hold for the paper's models, and the other
way round; [deviations](../deviations.md) lists every difference. `python -m lddyn claims --json` prints the same.

```{{raw}} html
<div id="claims-table">{display.verdict_table(entries, _figure_address)}</div>
<script src="../_static/scorecard.js"></script>
```
"""
    _write("scorecard.md", page)


def _numbers(entries: list[dict]) -> str:
    return ", ".join(str(e["id"]) for e in entries) or "-"


def _figure_address(entry: dict) -> str:
    """The section of a chapter with the figure behind a claim, from the scorecard."""
    if not entry["see"]:
        return ""
    return f"../notebooks/{entry['chapter']}.html#{make_id(entry['see'])}"


def write_chapters(shown: dict[str, dict]) -> None:
    """The table of the chapters for the first page: scale, seeds, and how long its runs took."""
    lines = ""
    for name in chapters():
        runs = [run.manifest for run in shown[name]["runs"]]
        seeds = len({m["parameters"]["seed"] for m in runs})
        minutes = sum(m["seconds"] for m in runs) / 60
        lines += f"| {{doc}}`/notebooks/{name}` | {shown[name]['scale']} | {seeds} | {len(runs)} | {minutes:.1f} |\n"
    head = "| chapter | scale | seeds | runs | minutes of one core |\n|---|---|---|---|---|\n"
    _write("chapters.md", head + lines)


def write_status() -> None:
    """The page with what was run, when, for how long and whether it is still fresh."""
    rows = "".join(
        f"<tr><td><code>{escape(e['run'])}</code></td><td>{e['state']}</td><td>{e.get('seconds') or '-'}</td>"
        f"<td>{escape((e.get('finished') or '')[:16].replace('T', ' '))}</td><td>{escape(e['why'])}</td></tr>"
        for e in records.status()
    )
    head = "".join(f"<th>{h}</th>" for h in ("run", "state", "seconds", "finished (UTC)", "why"))
    _write(
        "status.md",
        f"""# Status

This page is written when the book is built.

```{{include}} chapters.md
```

A run is *fresh* while the code that it reaches, its inputs and the versions of its libraries are unchanged;
`python -m lddyn status` prints the same list.

```{{raw}} html
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
```
""",
    )


def write_data_card() -> None:
    """The page about the built-in preference set, with its numbers computed."""
    splits = {name: preferences.load("builtin", name) for name in ("train", "test", "pretrain")}
    everything = [e for part in splits.values() for e in part]

    def words(kind: str, part: list) -> float:
        return sum(len(e[kind].split()) for e in part) / len(part)

    lines = "\n".join(
        f"| {name} | {len(part)} | {words('chosen', part):.1f} | {words('rejected', part):.1f} |"
        for name, part in splits.items()
    )
    chosen, rejected = ([e[kind] for e in everything] for kind in ("chosen", "rejected"))
    by_word, by_character = (preferences.style_accuracy(chosen, rejected, unit) for unit in ("word", "char"))
    _write(
        "data_card.md",
        f"""# Data card: the built-in preference set

**What.** Questions of people who write code, with two answers each: `chosen` fits the question, `rejected` does
not. For the training and test questions both answers also have a rephrasing that keeps the meaning
(`_semantic`) and one that keeps the form and changes the meaning (`_format`), and there is an unrelated human
sentence. Python, tools, scientific computing, statistics, data, machine learning, and everyday life around
them. American English.

| split | questions | words of chosen | words of rejected |
|---|---|---|---|
{lines}

`pretrain` is read only by the built-in model's pre-training; `test` is never trained on.

**How it was written.** For this companion, one item at a time, in several voices, with the help of a language
model; nothing is copied from another data set. Two answers of the same voice, length and vocabulary were
written first, and then the question for which one of them is right; which one was fixed beforehand, item by
item. In most pairs the rejected answer is true and useful, for another case; in some it has one wrong step; in
a few it is vague or beside the point, in a register that both answers share.

**Why so.** Where a classifier can tell chosen from rejected without the question, a small model finds that one
direction and DPO lowers everything together. Here TF-IDF and logistic regression, five folds grouped by
question, reach an accuracy of {by_word:.2f} on words and {by_character:.2f} on characters, where 0.50 is
chance; a test holds both at or below 0.60. `preferences.style_accuracy` measures your own data.

**Known weaknesses.** Facts about code were run in part, not all. Rephrases were written by the same writers as
the answers, so there is no foreign author's fingerprint to find. Form-keeping rephrases of answers with inline
code read oddly. The domain is narrow. It is made for measuring learning dynamics, not for aligning a model.

**Licence.** MIT, as the rest; `lddyn/data/preferences.jsonl`.
""",
    )


def write_bench() -> None:
    """The speed table of the page `run_it`: this machine's `make bench`, or the one that was recorded in `book/`."""
    own = records.runs_root() / "bench.json"
    measured = json.loads((own if own.exists() else BOOK / "bench.json").read_text())
    whose = "on this machine" if own.exists() else "on the authors of this companion's machine"
    _write("bench.md", f"Measured {whose}: {bench.report(measured)}\n")


def write_sweeps() -> None:
    """The tables of recorded sweeps, and what the paper's models need."""
    from lddyn import launch, sweep  # they import TRL, which takes seconds

    _write("sweeps.md", sweep.page())
    _write("estimates.md", launch.page())


def _write(name: str, text: str) -> None:
    GENERATED.mkdir(parents=True, exist_ok=True)
    records.write_atomically(GENERATED / name, lambda p: p.write_text(text))


# --- rendering ---------------------------------------------------------------------------------------------


def build(scale: str, force: bool = False) -> int:
    """What `make book` does. Returns the exit code: 0, or 1 when a notebook failed or the renderer warned.

    A second build waits for the first, and then finds everything fresh.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    runner.writable(GENERATED / "status.md")
    lock = FileLock(GENERATED / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print("lddyn: another build of this book is running; waiting for it")
        held = lock.acquire()
    with held:
        return _build(scale, force)


def _build(scale: str, force: bool) -> int:
    failures = execute(scale, force)
    if failures:
        for line in failures:
            print(f"lddyn: {line}", file=sys.stderr)
        return 1
    shown = published()
    write_hero(shown)
    write_chapters(shown)
    write_scorecard(claims.verdicts(shown))
    write_status()
    write_data_card()
    write_bench()
    write_sweeps()
    return render()


def jupyter_book(*options: str) -> subprocess.CompletedProcess:
    """Let Jupyter Book build all pages; what it printed is in the result."""
    start = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    return subprocess.run([*start, "build", str(BOOK), "--all", *options], capture_output=True, text=True)


def render() -> int:
    """Render the pages with Jupyter Book, warnings as errors; nothing is left over from an earlier build."""
    index = BOOK / "_build" / "html" / "index.html"
    shutil.rmtree(index.parent, ignore_errors=True)
    done = jupyter_book("-W", "-n", "--keep-going")
    if done.returncode or not index.exists():
        lines = (done.stdout + done.stderr).splitlines()
        told = [line for line in lines if re.search("WARNING|ERROR|Error", line)] or lines[-20:]
        print(*told, "lddyn: the book did not build without warnings", sep="\n", file=sys.stderr)
        return 1
    print(index)
    return 0
