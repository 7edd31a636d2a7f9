"""Own preference data gains the response types that it lacks: rephrasings written by a chat model (appendix D.1).

Each answer is asked for twice: in other words with the same meaning (`_semantic`), and in the same form with another
meaning (`_format`). The prompts are this companion's own, not the paper's. An answer that is of no use is counted and
named, and its row is left out; nothing is made up.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from lddyn import InputError
from lddyn.data import preferences
from lddyn.data.responses import Example
from lddyn.data.rows import is_text
from lddyn.engine import store
from lddyn.engine.pool import counted

PROMPTS = {
    "semantic": """Write the text below again in your own words. It must say the same: keep every fact, name and \
number, add nothing and leave nothing out. Change the words and the order of the parts as far as you can, and stay at \
about the same length. Answer with the new text alone, without a title, quotation marks or a remark.

Text: {text}

New text:""",
    "format": """Use the text below as a mould. Keep its form: as many sentences, about as many words, the same \
punctuation, the same small words between the others. Fill it with an entirely different subject, so that nothing of \
the meaning is left. Answer with the new text alone, without a title, quotation marks or a remark.

Text: {text}

New text:""",
}
AGAIN = "\n\n(An earlier attempt was {why}. Write another one.)"
KINDS = {f"{role}_{way}": (role, way) for role in ("chosen", "rejected") for way in PROMPTS}
QUOTES = {'"': '"', "“": "”", "'": "'"}


def question(kind: str, text: str, why: str | None = None) -> str:
    """What the chat model is asked for a response type such as `chosen_semantic`, after a useless attempt."""
    asked = PROMPTS[KINDS[kind][1]].replace("{text}", text.strip())
    return asked + AGAIN.replace("{why}", why) if why else asked


def tidy(answer: str) -> str:
    """The answer without white space and quotation marks around it."""
    answer = answer.strip()
    if len(answer) > 1 and QUOTES.get(answer[0]) == answer[-1] and answer[-1] not in answer[1:-1]:
        return answer[1:-1].strip()
    return answer


def problem(answer: str, original: str) -> str | None:
    """Why an answer is of no use, or None: empty, equal to the original, far too long or far too short."""
    words, before = answer.split(), original.split()
    if not words:
        return "empty"
    if not is_text(answer):
        return "no text: half a surrogate pair"
    if [w.casefold() for w in words] == [w.casefold() for w in before]:
        return "equal to the original"
    if len(words) > 2 * len(before) + 10:
        return "far too long"
    if 4 * len(words) < len(before):
        return "far too short"
    return None


def rephrasing(ask: Callable[[str], str], kind: str, original: str, attempts: int = 2) -> tuple[str, str | None]:
    """The answer for one type and one text, and why it is of no use, or None."""
    answer, why = "", None
    for _ in range(attempts):
        answer = tidy(ask(question(kind, original, why)))
        why = problem(answer, original)
        if why is None:
            break
    return answer, why


def rephrase(
    data: str, out: Path, ask: Callable[[str], str], limit: int | None = None, workers: int = 1, attempts: int = 2
) -> dict:
    """Write `data` with the rephrasings that it lacks to a JSON Lines file that `preferences.load` reads.

    `data` is what `preferences.load` takes; at most `limit` rows of each split, train and test. Every text is asked for
    up to `attempts` times, by `workers` threads. Returns, and writes beside the file, a report: `chat`, `asked`,
    `rows` and `left_out`, one `{id, split, type, why}` for each useless answer. Raises `InputError` when there
    is nothing to do, when no row of a split is left, or when `out` is a file that this function did not write.
    """
    report_path = out.with_name(f"{out.name}.report.json")
    if out.exists() and not report_path.exists():
        raise InputError(f"{out} exists and was not written by rephrase; choose another name or remove it")
    if Path(data).resolve() == out.resolve():
        raise InputError(f"the rephrased data cannot replace {data}; choose another name")
    examples = {split: preferences.load(data, split, limit=limit) for split in ("train", "test")}
    missing = [kind for kind in KINDS if kind not in examples["train"][0]]
    if not missing:
        raise InputError(f"{data} has all of {', '.join(KINDS)} already")
    tasks = [(split, n, kind) for split, part in examples.items() for n in range(len(part)) for kind in missing]

    def write(task: tuple[str, int, str]) -> tuple[str, str | None]:
        split, n, kind = task
        return rephrasing(ask, kind, examples[split][n][KINDS[kind][0]], attempts)

    threads = ThreadPoolExecutor(workers)
    try:
        written = dict(zip(tasks, counted(threads.map(write, tasks), "answers", len(tasks)), strict=True))
    finally:
        threads.shutdown(cancel_futures=True)
    left_out = [
        {"id": examples[split][n]["id"], "split": split, "type": kind, "why": why}
        for (split, n, kind), (_, why) in written.items()
        if why
    ]
    rows = [
        e
        | {"prompt": getattr(e["prompt"], "turns", e["prompt"]), "split": split}
        | {kind: written[split, n, kind][0] for kind in missing}
        for split, part in examples.items()
        for n, e in enumerate(part)
        if not any(written[split, n, kind][1] for kind in missing)
    ]
    report = {
        "chat": getattr(ask, "name", "a function"),
        "asked": len(tasks),
        "rows": dict(Counter(row["split"] for row in rows)),
        "left_out": left_out,
        "prompts": PROMPTS,
    }
    for split in examples:
        if split not in report["rows"]:
            raise InputError(f"no row of split {split!r} is left; {summary(report)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    store.write_json(report_path, report)
    _write(out, rows)
    return report


def _write(out: Path, rows: Sequence[Example]) -> None:
    table = pd.DataFrame(rows)
    store.write_atomically(out, lambda p: table.to_json(p, orient="records", lines=True, force_ascii=False))


def summary(report: dict) -> str:
    """One line: how many answers were asked for, how many were of no use and why, and where the first one is."""
    line = f"{report['asked']} answers, {len(report['left_out'])} of no use"
    if report["left_out"]:
        why = Counter(f"{entry['type']} {entry['why']}" for entry in report["left_out"])
        first = report["left_out"][0]
        line += f" ({', '.join(f'{n} x {what}' for what, n in why.most_common())}; the first in row {first['id']})"
    return f"{line}; rows kept: {', '.join(f'{n} {split}' for split, n in report['rows'].items()) or 'none'}"
