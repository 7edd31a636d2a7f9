"""The generated pages of the book: first page, scorecard, status, data card, speed, sweeps."""

import json
from html import escape
from pathlib import Path

import yaml
from docutils.nodes import make_id

from lddyn.chapters import claims, style
from lddyn.data import preferences, responses
from lddyn.engine import store
from lddyn.publish import display, hero, status
from lddyn.workshop import launch, sweep


def table(rows: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Rows as a Markdown table; `columns` maps a key to its heading and format."""
    lines = [[heading for heading, _ in columns.values()], ["---"] * len(columns)]
    lines += [[format(row[key], style) for key, (_, style) in columns.items()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(measured: dict) -> str:
    """What `bench` measured, as Markdown."""
    device, threads = measured["device"], measured["threads"]
    unit = "CPU s" if device == "cpu" and threads == 1 else "s"
    rate = f"{measured['matrix_gflops']:.0f} GFLOP/s in a matrix product"
    parts = [
        f"{device}, {threads} thread{'s' * (threads > 1)}, {rate}, {measured['recorded'][:10]}",
        table(
            measured["ways"],
            {
                "model": ("model", ""),
                "way": ("way", ""),
                "seconds": (unit, ".2f"),
                "ratio": ("times shared", ".2f"),
                "memory_mb": ("memory, MiB", "d"),
                "share": ("share of the matrix rate", ".0%"),
                "difference": ("largest difference, nats per token", ".0e"),
            },
        ),
        "The built-in model with longer prompts:",
        table(
            measured["prompt_lengths"],
            {
                "prompt_tokens": ("prompt tokens", "d"),
                "authors": ("the authors' way, times shared", ".2f"),
                "plain": ("plain batches, times shared", ".2f"),
            },
        ),
        "Cost and memory of shared prompts, built-in model:",
        table(
            measured["growth"],
            {
                "prompts": ("prompts", "d"),
                "seconds": (unit, ".2f"),
                "each": ("milliseconds a prompt", ".1f"),
                "memory_mb": ("memory, MiB", "d"),
            },
        ),
        "What one SFT step does to many responses, to first order (chapter 2):",
        table(
            measured["predictions"],
            {
                "parameters": ("parameters", ",d"),
                "observations": ("responses", "d"),
                "way": ("way", ""),
                "seconds": (unit, ".3f"),
                "ratio": ("times one jvp", ".2f"),
                "forwards": ("forward passes", ".1f"),
                "memory_mb": ("memory, MiB", "d"),
                "difference": ("largest difference, of the largest change", ".0e"),
            },
        ),
    ]
    return "\n\n".join(parts)


BOOK = store.ROOT / "book"
EXECUTED = BOOK / "notebooks"
GENERATED = BOOK / "generated"


def chapters() -> list[str]:
    """The notebooks in the order of the table of contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [Path(f).stem for f in files if f.startswith("notebooks/")]


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
                    runs = [store.runs_root() / name for name in bundle["runs"]]
                    if all((folder / "table.parquet").exists() for folder in runs):
                        found[bundle["chapter"]] = {
                            "scale": bundle["scale"],
                            "runs": [store.load(folder) for folder in runs],
                        }
    return found


# --- generated pages ---------------------------------------------------------------------------------------


def write_hero(shown: dict[str, dict]) -> None:
    """The figure of the first page."""
    style.use_style()
    digits, sft = (store.frame(shown[chapter]["runs"]) for chapter in ("01_mnist", "03_sft"))
    figure = hero.hero(digits, sft)
    GENERATED.mkdir(parents=True, exist_ok=True)
    store.write_atomically(
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
        for e in status.status()
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
    by_word, by_character = (responses.style_accuracy(chosen, rejected, unit) for unit in ("word", "char"))
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
    own = store.runs_root() / "bench.json"
    measured = json.loads((own if own.exists() else BOOK / "bench.json").read_text())
    whose = "on this machine" if own.exists() else "on the authors of this companion's machine"
    _write("bench.md", f"Measured {whose}: {report(measured)}\n")


def write_sweeps() -> None:
    """The tables of recorded sweeps, and what the paper's models need."""

    _write("sweeps.md", sweep.page())
    _write("estimates.md", launch.page())


def _write(name: str, text: str) -> None:
    GENERATED.mkdir(parents=True, exist_ok=True)
    store.write_atomically(GENERATED / name, lambda p: p.write_text(text))
