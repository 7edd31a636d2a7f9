"""`python -m lddyn`: run a notebook, build the book, list runs and verdicts. Bad input: one line, exit code 2."""

import argparse
import json
import os
import sys
from pathlib import Path

from lddyn import InputError, __version__, claims, records


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lddyn", description=__doc__.split(":")[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute one notebook with checked parameters")
    run.add_argument("name", help="notebook, e.g. 01_mnist")
    run.add_argument("-p", dest="words", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    run.add_argument("--scale", help="smoke, laptop or paper")
    run.add_argument("--params", type=Path, help="YAML file of parameters")
    run.add_argument("--out", type=Path, help="where to write the executed notebook (default: into the book)")
    run.add_argument("--timeout", type=int, help="seconds that one cell may take")

    show = commands.add_parser("parameters", help="list the parameters of a notebook")
    show.add_argument("name")

    book = commands.add_parser("book", help="execute every stale notebook and build the book")
    book.add_argument("--scale", default="laptop")
    book.add_argument("--force", action="store_true", help="execute fresh notebooks too")

    status = commands.add_parser("status", help="list runs: fresh, stale (which input changed), unfinished")
    status.add_argument("--json", action="store_true")

    verdicts = commands.add_parser("claims", help="the verdict on every claim of the paper")
    verdicts.add_argument("--json", action="store_true")

    bench = commands.add_parser("bench", help="measure the probing engine beside two other ways, in one run")
    bench.add_argument("--repeats", type=int, default=3)
    bench.add_argument("--device", default="cpu", help="cpu or cuda")
    bench.add_argument("--threads", type=int, default=1)
    bench.add_argument("--out", type=Path, help="JSON file (default: runs/bench.json)")
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except (InputError, records.RecordError) as error:
        print(f"lddyn: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(a) -> int:
    from lddyn import runner

    return runner.run(a.name, [tuple(w) for w in a.words], a.scale, a.params, a.out, a.timeout)


def _parameters(a) -> int:
    from lddyn import runner

    for p in runner.parameters(runner.notebook_path(a.name)).values():
        print(f"{p.name} = {p.default!r}: {p.describe()}. {p.help}")
    return 0


def _book(a) -> int:
    from lddyn import book

    return book.build(a.scale, a.force)


def _status(a) -> int:
    entries = records.status()
    if a.json:
        print(json.dumps(entries, indent=1))
    else:
        for e in entries:
            print(f"{e['state']:<10} {e['run']:<44} {e.get('seconds') or '-':>8} s  {e['why']}")
        print(f"{len(entries)} runs in {records.runs_root()}")
    return 0


def _claims(a) -> int:
    from lddyn import book

    entries = claims.verdicts(book.published())
    if a.json:
        print(json.dumps(entries, indent=1))
    else:
        for e in entries:
            print(f"{e['id']:>2}  {e['verdict']:<15} {e['claim']}\n    {'':<15} {e['reason']}")
    return 0


def _bench(a) -> int:
    from lddyn import bench

    print(bench.report(bench.bench(a.repeats, a.device, a.threads, a.out)))
    return 0


COMMANDS = {
    "run": _run,
    "parameters": _parameters,
    "book": _book,
    "status": _status,
    "claims": _claims,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
