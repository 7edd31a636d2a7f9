"""`lddyn` or `python -m lddyn`: run a notebook, build the book, train a model of your own.

Bad input is one line and exit code 2.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from lddyn import InputError, __version__
from lddyn.chapters import claims
from lddyn.engine import pool, pretraining, store
from lddyn.engine.released import FILE
from lddyn.engine.settings import derive
from lddyn.publish import build, notebooks, pages, pdf, status
from lddyn.workshop import (
    chat,
    estimate,
    launch,
    preflight,
    preflight_advice,
    preflight_page,
    preflight_worth,
    pretrained,
    released,
    rephrase,
    replicates,
    report,
    sweep,
    tune,
)


def parser() -> argparse.ArgumentParser:
    name = "lddyn" if Path(sys.argv[0]).stem == "lddyn" else "python -m lddyn"
    top = argparse.ArgumentParser(prog=name, description=__doc__.split("`: ")[1])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute one notebook with checked parameters")
    run.add_argument("name", help="notebook, e.g. 01_mnist")
    run.add_argument("-p", dest="words", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    run.add_argument("--scale", help="smoke, laptop or paper")
    run.add_argument("--params", type=Path, help="YAML file of parameters")
    run.add_argument("--out", type=Path, help="where to write the executed notebook (default: into the book)")
    run.add_argument("--timeout", type=positive, help="seconds that one cell may take")

    show = commands.add_parser("parameters", help="list the parameters of a notebook, or of train")
    show.add_argument("name", help="notebook, or train")

    train = commands.add_parser(
        "train", help="SFT or DPO of any model with the probes; also under torchrun or accelerate launch"
    )
    train.add_argument("settings", nargs="*", help="parameter files, or names of book/settings; later ones win")
    _set_option(train)
    train.add_argument("--force", action="store_true", help="also where the memory seems too small")

    need = commands.add_parser("estimate", help="memory and time of a training, without its weights")
    need.add_argument("settings", nargs="*", help="as for train")
    _set_option(need)
    need.add_argument("--memory", type=float, help="GiB to fit into (default: what is free here)")
    need.add_argument("--processes", type=positive, default=1, help="that train together")
    need.add_argument("--sharded", action="store_true", help="over the processes, by FSDP2")

    sweep = commands.add_parser("sweep", help="train once for each combination of a file, and tabulate")
    sweep.add_argument("file", type=Path, help="YAML file, such as book/sweeps/learning_rate.yml")
    sweep.add_argument("--engine", default="processes", help="processes, dask or submitit")
    sweep.add_argument("--workers", type=positive, help="how many at once (default: one for each core)")
    sweep.add_argument("--address", help="of a running dask scheduler; or the submitit cluster, such as slurm")
    sweep.add_argument("--out", type=Path, help="JSON file of the table (default: beside the sweep's file)")

    report = commands.add_parser("report", help="curves and scorecard of a run of your own, as a page of HTML")
    report.add_argument("folders", nargs="+", type=Path, help="output of a ProbeCallback or a run; more are more seeds")
    report.add_argument("--method", help="sft or dpo, where the folder does not say")
    report.add_argument("--out", type=Path, help="HTML file (default: report.html in the first folder)")

    words = commands.add_parser("rephrase", help="own preference data gains the response types that it lacks")
    words.add_argument("data", help="JSON Lines file with prompt, chosen and rejected, or a hub id")
    words.add_argument("out", type=Path, help="JSON Lines file to write")
    words.add_argument("--chat", required=True, help="local:FOLDER, local:HUB-ID or endpoint (see LDDYN_API_URL)")
    words.add_argument("--limit", type=positive, help="rows of each split")
    words.add_argument("--budget", type=positive, help="requests that an endpoint may be sent")
    words.add_argument("--workers", type=positive, default=1, help="requests at once")
    words.add_argument("--max-tokens", type=positive, default=256, help="tokens of an answer")
    words.add_argument("--device", default="cpu", help="of a local model: cpu or cuda")

    before = commands.add_parser("preflight", help="before DPO: what it will do to these pairs, and which pairs do it")
    before.add_argument("data", nargs="?", default="builtin", help="JSON Lines file, or a hub id (default: builtin)")
    before.add_argument("--model", default="builtin", help="builtin, smollm2, a folder or a hub id")
    before.add_argument("--pairs", type=positive, default=64, help="how many, from the first (default: 64)")
    before.add_argument("--margin", type=above_zero, default=10.0, help="nats to forecast at (default: 10)")
    before.add_argument("--beta", type=above_zero, default=0.1, help="of DPO (default: 0.1)")
    before.add_argument("--optimizer", default="adamw", help="adamw, rmsprop or sgd")
    before.add_argument("--batch-size", type=positive, default=4, help="pairs of one step (default: 4)")
    before.add_argument("--max-prompt", type=positive, default=256, help="tokens of a prompt (default: 256)")
    before.add_argument("--max-response", type=positive, default=256, help="tokens of an answer (default: 256)")
    before.add_argument("--format", default="auto", help="auto, chat or plain")
    before.add_argument("--device", default="cpu", help="cpu or cuda")
    before.add_argument(
        "--sft-first", type=positive, nargs="?", const=2, default=0, help="also after so many epochs of SFT (2)"
    )
    before.add_argument("--report", type=Path, help="HTML file to write too")
    before.add_argument("--json", action="store_true", help="print all numbers instead of words")
    before.add_argument(
        "--worth", nargs="?", const="forecasts", choices=("forecasts", "advice"),
        help="record for the book how well forecasts come true on this data and model, or what the advice does",
    )  # fmt: skip

    book = commands.add_parser("book", help="execute every stale notebook and build the book")
    book.add_argument("--scale", default="laptop")
    book.add_argument("--force", action="store_true", help="execute fresh notebooks too")
    book.add_argument("--strict", action="store_true", help="fail where a text says what its table does not")

    pdf = commands.add_parser("pdf", help="print the built book to one PDF (needs Chromium)")
    pdf.add_argument("--out", type=Path, default=store.ROOT / "book" / "_build" / "companion.pdf")

    status = commands.add_parser("status", help="list runs: fresh, stale (which input changed), unfinished")
    status.add_argument("--json", action="store_true")

    verdicts = commands.add_parser("claims", help="the verdict on every claim of the paper")
    verdicts.add_argument("--json", action="store_true")

    logs = commands.add_parser("released", help="the authors' released logs, judged by the rules of the claims")
    logs.add_argument("path", type=Path, help="Parquet table of logs, or a folder with clones of the repositories")
    logs.add_argument("--out", type=Path, default=FILE, help="JSON file (default: book/recorded/released.json)")

    again = commands.add_parser("pretrain", help="make the built-in models again and say whether they are equal")
    again.add_argument("sizes", nargs="*", help="tiny, small, world (default: all)")
    again.add_argument("--ship", action="store_true", help="put them in the place of those of the package")

    other = commands.add_parser("replicates", help="record chapters 3 and 5 with other base models and data")
    other.add_argument("--scale", default="laptop", help="whose settings (default: laptop)")
    how = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "FILE")}
    other.add_argument("--data", help="more data than halves of the built-in pairs, in JSON Lines", **how)

    real = commands.add_parser("pretrained", help="make the recorded runs on SmolLM2 again, and compare")
    real.add_argument("pieces", nargs="*", help="such as 03_sft/main (default: all, what matters most first)")
    real.add_argument("--seeds", type=positive, help="number of seeds (default: by scale)")
    real.add_argument("--first-seed", type=int, help="the first of them (default: by scale)")
    real.add_argument("--record", action="store_true", help="put them in the place of those of the book")
    return top


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, not {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"takes a number above 0, not {text!r}")
    return value


def _set_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", dest="words", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="one more setting"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except (InputError, store.RecordError, chat.ChatError) as error:
        if os.environ.get("RANK", "0") == "0":  # all processes of a training fail alike
            print(f"lddyn: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(a) -> int:

    return notebooks.run(a.name, [tuple(w) for w in a.words], a.scale, a.params, a.out, a.timeout)


def _parameters(a) -> int:

    known = launch.PARAMETERS if a.name == "train" else notebooks.parameters(notebooks.notebook_path(a.name))
    for p in known.values():
        print(f"{p.name} = {p.default!r}: {p.describe()}. {p.help}")
    return 0


def _train(a) -> int:
    pool.show_progress()
    run = launch.train(a.settings, dict(a.words), a.force)
    if run:
        print(run.folder)
    return 0


def _estimate(a) -> int:

    chosen = launch.settings(a.settings, dict(a.words))
    tune.share_of_batch(chosen.batch_size, chosen.accumulation, a.processes)
    print(estimate.report(estimate.estimate(chosen, a.processes, a.sharded)))
    estimate.refuse_what_does_not_fit(chosen, a.processes, a.sharded, a.memory)
    return 0


def _sweep(a) -> int:
    pool.show_progress()
    print(sweep.sweep(a.file, a.engine, a.workers, a.address, a.out))
    return 0


def _report(a) -> int:

    print(report.write(a.folders, a.method, a.out))
    return 0


def _rephrase(a) -> int:
    pool.show_progress()
    ask = chat.connect(a.chat, a.max_tokens, a.device, a.budget)
    print(rephrase.summary(rephrase.rephrase(a.data, a.out, ask, a.limit, a.workers)))
    return 0


def _preflight(a) -> int:
    pool.show_progress()
    if a.worth:
        print(preflight_advice.record() if a.worth == "advice" else preflight_worth.record(a.data, a.model))
        return 0
    if a.report:
        store.writable(a.report)
    found = preflight.preflight(derive(preflight.Preflight, a))
    if a.report:
        preflight_page.write(found, a.report)
    print(json.dumps(found, indent=1) if a.json else preflight_page.text(found))
    return 0


def _book(a) -> int:

    return build.build(a.scale, a.force, a.strict)


def _pdf(a) -> int:

    print(pdf.write(a.out))
    return 0


def _status(a) -> int:
    entries = status.status()
    if a.json:
        print(json.dumps(entries, indent=1))
    else:
        for e in entries:
            print(f"{e['state']:<10} {e['run']:<44} {e.get('seconds') or '-':>8} s  {e['why']}")
        print(f"{len(entries)} runs in {store.runs_root()}")
    return 0


def _claims(a) -> int:

    entries = claims.verdicts(pages.published())
    if a.json:
        print(json.dumps(entries, indent=1))
    else:
        for e in entries:
            claim = f"{e['claim']} (beyond the paper)" if e["group"] else e["claim"]
            print(f"{e['id']:>2}  {e['verdict']:<15} {claim}\n    {'':<15} {e['reason']}")
    return 0


def _released(a) -> int:

    print(released.record(a.path, a.out))
    return 0


def _pretrain(a) -> int:
    from lddyn import unknown

    for size in a.sizes:
        if size not in pretraining.SIZES:
            raise unknown("size", size, pretraining.SIZES)
    pool.show_progress()
    equal = True
    for size in a.sizes or pretraining.SIZES:
        same, line = pretraining.repeat(size, a.ship)
        print(line, flush=True)
        equal &= same
    return 0 if equal else 1


def _replicates(a) -> int:
    pool.show_progress()
    print(replicates.record(a.scale, dict(a.data), {}))
    return 0


def _pretrained(a) -> int:
    pool.show_progress()
    pretrained.make(a.pieces, {"seeds": a.seeds, "first_seed": a.first_seed}, a.record)
    return 0


COMMANDS = {
    "run": _run,
    "parameters": _parameters,
    "train": _train,
    "estimate": _estimate,
    "sweep": _sweep,
    "report": _report,
    "rephrase": _rephrase,
    "preflight": _preflight,
    "book": _book,
    "pdf": _pdf,
    "status": _status,
    "claims": _claims,
    "released": _released,
    "pretrain": _pretrain,
    "pretrained": _pretrained,
    "replicates": _replicates,
}

if __name__ == "__main__":
    sys.exit(main())
