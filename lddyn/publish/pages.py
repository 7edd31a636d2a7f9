"""The generated pages of the book: the templates in `book/templates`, filled with numbers, in `book/generated`."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt
import pandas as pd
import yaml
from docutils.nodes import make_id
from matplotlib.figure import Figure

from lddyn.chapters import claims, sentences, style
from lddyn.chapters.variants.figures import softening
from lddyn.data import preferences, responses
from lddyn.engine import gguf, recorded, released, store
from lddyn.publish import across, display, figures, paper_scale, status
from lddyn.workshop import estimate, launch, preflight_advice, preflight_worth, sweep

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


def filled(name: str, **values: object) -> str:
    """The template of a page with every `$name` in it replaced; raises `KeyError` for one that has no value."""
    return Template((BOOK / "templates" / name).read_text()).substitute(values)


def _write(name: str, **values: object) -> None:
    GENERATED.mkdir(parents=True, exist_ok=True)
    store.write_atomically(GENERATED / name, lambda path: path.write_text(filled(name, **values)))


def _draw(name: str, draw: Callable[..., Figure], *given: object, made: Mapping[str, str], first: str = "") -> None:
    """Write the figure that a function draws, and what stands under it. `first`: a command that comes before."""
    figure = draw(*given)
    GENERATED.mkdir(parents=True, exist_ok=True)
    store.write_atomically(
        GENERATED / name, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
    )
    commands = [*filter(None, [first]), "make book"]
    figures.write(GENERATED / "figures" / name, style.panels(figure), commands, made, figures.place(draw))
    plt.close(figure)


def write_under_figures(shown: Mapping[str, dict]) -> None:
    """What stands under the figures of the chapters."""
    for name, entry in shown.items():
        figures.write_chapter(GENERATED / "figures", EXECUTED / f"{name}.ipynb", entry["scale"], entry["runs"])


def _made(shown: Mapping[str, dict], *names: str) -> dict[str, str]:
    return {f"runs of {name}, scale {shown[name]['scale']}": figures.origin(shown[name]["runs"]) for name in names}


def write_hero(shown: dict[str, dict]) -> None:
    """The figure of the first page."""
    style.use_style()
    own, groups = ("01_mnist", "03_sft"), (("03_sft", "main"), ("05_dpo", "after_sft"))
    real = {f"recorded runs {'/'.join(group)}": recorded.read(*group) for group in groups}
    tables = map(store.frame, [*(shown[chapter]["runs"] for chapter in own), *real.values()])
    made = _made(shown, *own) | {name: figures.origin(runs) for name, runs in real.items()}
    _draw("hero.svg", across.hero, *tables, made=made)


def write_across(shown: dict[str, dict]) -> None:
    """What chapter 2 shows beside chapter 1, and chapter 7 beside chapter 6."""
    style.use_style()
    runs = {chapter: entry["runs"] for chapter, entry in shown.items()}
    carried = across.carried_over(store.frame(runs["02_decomposition"]), store.frame(runs["01_mnist"]))
    _write("carried_over.md", table=display.table(carried))
    ends = across.ways_to_soften(runs["06_variants"], runs["07_extend"])
    _draw("softening.svg", softening, ends, made=_made(shown, "06_variants", "07_extend"))
    mean = ends.groupby("name")[["chosen", "margin", "won"]].mean()
    _write("softening.md", table=display.table(mean.sort_values("won")))


def write_scorecard(judged: list[dict]) -> None:
    """The page with every claim and its verdict at three scales, and a summary; those beyond the paper stand apart."""
    entries, beyond = claims.of_group(judged), claims.of_group(judged, "beyond")
    real = claims.on_real_model(recorded.published())
    identities = [e for e in entries if e["grade"] == "identity"]
    by_verdict = {v: [e for e in entries if e["verdict"] == v and e not in identities] for v in claims.VERDICTS}
    on_real = {v: [e for e in real if e["verdict"] == v] for v in claims.VERDICTS}
    on_logs = {v: [e for e in entries if e["released"] and e["released"]["verdict"] == v] for v in claims.VERDICTS}
    on_logs["not attempted"] = [e for e in entries if not e["released"]]

    def numbers(those: list[dict]) -> str:
        return ", ".join(str(e["id"]) for e in those) or "-"

    def cells(those: list[dict], verdict: str) -> tuple[int, str]:
        return len(those), numbers(those) if verdict != "not attempted" else ""

    _write(
        "scorecard.md",
        count=len(entries),
        counts=", ".join(f"{len(those)} {v}" for v, those in by_verdict.items()),
        identities=numbers(identities),
        checked=f"{sum(e['verdict'] == 'replicated' for e in identities)} of {len(identities)}",
        scales=", ".join(sorted({e["scale"] for e in entries if e["scale"]})) or "none",
        summary=claims.markdown_table(
            ("verdict", "small model and digits", "numbers", "SmolLM2-135M", "numbers", "released logs", "numbers"),
            [
                (v, len(those), numbers(those), *cells(on_real[v], v), *cells(on_logs[v], v))
                for v, those in by_verdict.items()
            ],
        ),
        replicates=_replicates_in_words(),
        table=claims.as_html(entries, links=_figure_address, real=real),
        beyond_count=len(beyond),
        beyond_counts=", ".join(f"{sum(e['verdict'] == v for e in beyond)} {v}" for v in claims.VERDICTS),
        beyond_table=claims.as_html(beyond, links=_figure_address),
    )


def _replicates_in_words() -> str:
    rows = recorded.replicates()
    if not rows:
        return "none is recorded"
    bases, data = (len({row[name] for row in rows}) for name in ("base", "data"))
    return f"{bases} base models times {data} sets of data, recorded"


def write_found(all_judged: list[dict]) -> list[str]:
    """What was found, for the first page; returns what it asserts and the recorded runs do not bear out."""
    real, entries = recorded.published(), claims.of_group(all_judged)
    judged = [e for e in entries if e["grade"] != "identity"]
    identities = [e for e in entries if e["grade"] == "identity"]

    def counted(verdicts: Iterable[str]) -> str:
        found = Counter(verdicts)
        return ", ".join(f"{found[v]} {v}" for v in claims.VERDICTS if found[v] and v != "not attempted") or "none"

    found = sentences.said(
        filled(
            "found.md",
            count=len(entries),
            identities=len(identities),
            checked=sum(e["verdict"] == "replicated" for e in identities),
            small=counted(e["verdict"] for e in judged),
            scales=", ".join(sorted({f"scale {e['scale']}" for e in judged if e["scale"]})) or "not run yet",
            real=counted(e["verdict"] for e in claims.on_real_model(real)),
            logs=counted(e["released"]["verdict"] for e in entries if e["released"]),
        ),
        "03_sft",
        lambda chapter: claims.by_seed(real[chapter]["runs"]),
    )
    GENERATED.mkdir(parents=True, exist_ok=True)
    store.write_atomically(GENERATED / "found.md", lambda path: path.write_text(found.text))
    return found.refuted


def write_paper_scale(shown: dict[str, dict]) -> None:
    """The page on the authors' released logs, beside what this companion has measured itself."""
    style.use_style()
    sft, dpo = paper_scale.runs("sft"), paper_scale.runs("dpo", "extend_dpo", "sparse_dpo")
    tables = paper_scale.tables(shown, recorded.published())
    mine = {method: paper_scale.ours(tables, method) for method in paper_scale.CHAPTERS}
    everywhere = paper_scale.runs(*dict.fromkeys(run["kind"] for run in released.recorded()["runs"]))
    tops = [run for run in everywhere if paper_scale.TOP in run["curves"]]
    for name, draw, logs in (
        ("released_sft.svg", paper_scale.multiples, paper_scale.longest(sft)),
        ("released_dpo.svg", paper_scale.multiples, paper_scale.longest(dpo)),
        ("released_top.svg", paper_scale.top, tops),
    ):
        made = {f"{len(logs)} released logs": "one run each · repositories and commits at the end of this page"}
        _draw(name, draw, logs, made=made, first="python -m lddyn released FOLDER-OF-CLONES")
    _write(
        "paper_scale.md",
        there=paper_scale.what_there_is(),
        reading=paper_scale.reading_sentence(),
        sft=paper_scale.sft_sentence(),
        sft_agreement=paper_scale.agreement_sentence(sft, mine["sft"]),
        sft_table=display.table(paper_scale.end_changes(sft, mine["sft"]), index=False),
        controls_sentence=paper_scale.controls_sentence(),
        controls_table=display.table(paper_scale.controls(), index=False),
        starts_sentence=paper_scale.starts_sentence(),
        starts_table=display.table(paper_scale.starts(), index=False),
        dpo_agreement=paper_scale.agreement_sentence(paper_scale.runs("dpo"), mine["dpo"]),
        dpo_table=display.table(paper_scale.end_changes(dpo, mine["dpo"]), index=False),
        extended_sentence=paper_scale.extended_sentence(),
        extended_table=display.table(paper_scale.extended()),
        verdicts_sentence=paper_scale.verdicts_sentence(),
        verdicts_table=display.table(paper_scale.verdicts(), index=False),
        sources_table=display.table(paper_scale.sources(), index=False),
    )


def _figure_address(entry: dict) -> str:
    """The section of a chapter with the figure behind a claim, from the scorecard."""
    if not entry["see"]:
        return ""
    return f"../notebooks/{entry['chapter']}.html#{make_id(entry['see'])}"


def write_chapters(shown: dict[str, dict]) -> None:
    """The table of the chapters for the first page: scale, seeds, and how long its runs took."""
    rows = []
    for name in chapters():
        runs = [run.manifest for run in shown[name]["runs"]]
        seeds = len({m["parameters"]["seed"] for m in runs})
        minutes = sum(m["seconds"] for m in runs) / 60
        rows.append((f"{{doc}}`/notebooks/{name}`", shown[name]["scale"], seeds, len(runs), f"{minutes:.1f}"))
    heads = ("chapter", "scale", "seeds", "runs", "minutes of one core")
    _write("chapters.md", table=claims.markdown_table(heads, rows))


def write_citation() -> None:
    """How to cite the paper and this companion, for the first page; what `CITATION.cff` says."""
    about = yaml.safe_load((store.ROOT / "CITATION.cff").read_text())
    paper = about["preferred-citation"]
    _write(
        "citation.md",
        paper=paper["title"],
        paper_authors=" and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]),
        conference=paper["conference"]["name"],
        year=paper["year"],
        url=paper["url"],
        title=about["title"],
        authors=" and ".join(a["name"] for a in about["authors"]),
        version=about["version"],
        date=about["date-released"],
        repository=about["repository-code"],
    )


def write_status() -> None:
    """The page with what was run, when, for how long and whether it is still fresh."""
    rows = [
        {
            "run": e["run"],
            "state": e["state"],
            "seconds": str(e.get("seconds") or "-"),
            "finished (UTC)": (e.get("finished") or "")[:16].replace("T", " "),
            "why": e["why"],
        }
        for e in status.status()
    ]
    _write("status.md", table=display.table(pd.DataFrame(rows), index=False))


def write_data_card() -> None:
    """The page about the built-in preference set, with its numbers computed."""
    splits = {name: preferences.load("builtin", name) for name in ("train", "test", "pretrain")}
    everything = [e for part in splits.values() for e in part]

    def words(kind: str, part: list) -> str:
        return f"{sum(len(e[kind].split()) for e in part) / len(part):.1f}"

    rows = [(name, len(part), words("chosen", part), words("rejected", part)) for name, part in splits.items()]
    chosen, rejected = ([e[kind] for e in everything] for kind in ("chosen", "rejected"))
    by_word, by_character = (responses.style_accuracy(chosen, rejected, unit) for unit in ("word", "char"))
    _write(
        "data_card.md",
        splits=claims.markdown_table(("split", "questions", "words of chosen", "words of rejected"), rows),
        by_word=f"{by_word:.2f}",
        by_character=f"{by_character:.2f}",
    )


def write_model_card() -> None:
    """The page about the real language model, with what it needs for a byte of text beside the built-in one."""
    rows = pd.DataFrame(json.loads(recorded.CARD.read_text()))
    real = rows[rows.model == "smollm2"].iloc[0]
    _write(
        "smollm2.md",
        parameters=f"{real.parameters / 1e6:.1f}",
        vocabulary=f"{real.vocabulary:,}",
        get=gguf.GET,
        table=display.table(rows.drop(columns=["parameters", "vocabulary"]), index=False),
    )


def write_sweeps() -> None:
    """The tables of recorded sweeps, and what the paper's models need."""
    _write("sweeps.md", sweeps=sweep.sections())
    _write(
        "estimates.md",
        table=launch.table(),
        teraflops=f"{launch.RATE / 1e12:.0f}",
        reached=f"{estimate.REACHED:.0%}",
    )


def write_preflight() -> None:
    """The page about `lddyn preflight`: forecasts and training on recorded settings, and what the advice did."""
    advice, made = store.kept("recorded/preflight/advice")
    _write(
        "preflight.md",
        records="\n\n".join(map(preflight_record, preflight_worth.recorded())),
        rate=f"{advice.lr.max():g}",
        pairs=advice.trained.max(),
        held_out=preflight_advice.HELD_OUT,
        orders=advice.orders.max(),
        settings=int((advice.way == "all").sum()),
        seeds=advice.seed.nunique(),
        advice="\n".join(f"- {sentence}" for sentence in preflight_advice.verdict(advice)),
        summary=display.table(preflight_advice.summary(advice)),
        origin=store.in_words(made),
    )


def preflight_record(record: preflight_worth.Recorded) -> str:
    """What is recorded of a model and data, as Markdown: in words, and a table of ranks and one of means."""
    shared = {"between_orders": "between orders", "attainable": "attainable"}
    ranks = shared | {"forecast": "forecast", "slope": "first order"} | preflight_worth.RIVALS
    kinds, of = (
        {"chosen": "chosen", "top": "y*", "unpushed": "not pushed"},
        {"change": "measured", "forecast": "forecast"},
    )
    means = {f"{kind}_{one}": f"{name}, {word}" for kind, name in kinds.items() for one, word in of.items()}
    table = record.table
    rows = table.assign(setting=table.pairs + ", " + table.start).set_index(["setting", "lr", "seed"])
    return "\n\n".join(
        [
            f"### Model {record.model}, data {record.data}",
            f"{len(table)} settings of {table.trained.max()} pairs in {table.orders.max()} random orders. "
            + preflight_worth.verdict(table),
            "Spearman correlations over pairs with the measured change of the chosen answers:",
            display.table(rows[list(ranks)].dropna(axis=1, how="all").rename(columns=ranks), digits=2),
            "Means in nats, summed over a response, at the margin that was measured:",
            display.table(rows[["margin", *means]].rename(columns=means)),
            preflight_worth.calibration(table).replace("y*", r"y\*"),
            *map(store.in_words, record.made),
        ]
    )


# --- the speed ---------------------------------------------------------------------------------------------


def write_bench() -> None:
    """The speed table of the page `run_it`: this machine's `make bench`, or the one that was recorded in `book/`."""
    recorded, own = json.loads((BOOK / "bench.json").read_text()), store.runs_root() / "bench.json"
    mine = json.loads(own.read_text()) if own.exists() else {}
    measured, whose = recorded, "on the machine of this companion's authors"
    if mine.keys() >= recorded.keys():  # not one of before, which measured less
        measured, whose = mine, "on this machine"
    _write("bench.md", **in_words(measured, whose))


def report(measured: dict) -> str:
    """What `bench` measured, as Markdown."""
    return filled("bench.md", **in_words(measured, "on this machine"))


def in_words(measured: dict, whose: str) -> dict[str, str]:
    """What the template `bench` needs: where it was measured, and the tables."""
    device, threads = measured["device"], measured["threads"]
    unit = "CPU s" if device == "cpu" and threads == 1 else "s"
    columns = {  # of each table: key, heading, format
        "ways": (
            ("model", "model", ""),
            ("way", "way", ""),
            ("seconds", unit, ".2f"),
            ("ratio", "times shared", ".2f"),
            ("memory_mb", "memory, MiB", "d"),
            ("share", "share of the matrix rate", ".0%"),
            ("products", "of its time in matrix products and attention", ".0%"),
            ("difference", "largest difference, nats per token", ".0e"),
        ),
        "prompt_lengths": (
            ("prompt_tokens", "prompt tokens", "d"),
            ("authors", "the authors' way, times shared", ".2f"),
            ("plain", "plain batches, times shared", ".2f"),
        ),
        "growth": (
            ("prompts", "prompts", "d"),
            ("seconds", unit, ".2f"),
            ("each", "milliseconds a prompt", ".1f"),
            ("memory_mb", "memory, MiB", "d"),
        ),
        "predictions": (
            ("parameters", "parameters", ",d"),
            ("observations", "responses", "d"),
            ("way", "way", ""),
            ("seconds", unit, ".3f"),
            ("ratio", "times one jvp", ".2f"),
            ("forwards", "forward passes", ".1f"),
            ("memory_mb", "memory, MiB", "d"),
            ("difference", "largest difference, of the largest change", ".0e"),
        ),
        "sharing": (
            ("way", "48 responses", ""),
            ("seconds", unit, ".3f"),
            ("ratio", "times shared", ".2f"),
            ("forwards", "forward passes over unique tokens", ".1f"),
        ),
        "influences": (
            ("pairs", "pairs", "d"),
            ("observations", "responses", "d"),
            ("way", "way", ""),
            ("seconds", unit, ".1f"),
            ("ratio", "times influences", ".1f"),
            ("difference", "largest difference, of the largest change", ".0e"),
        ),
    }
    found = {
        name: claims.markdown_table(
            [head for _, head, _ in wanted],
            [
                ["" if row.get(key) is None else format(row[key], style) for key, _, style in wanted]
                for row in measured[name]
            ],
        )
        for name, wanted in columns.items()
    }
    return found | {
        "whose": whose,
        "device": device,
        "threads": f"{threads} thread{'s' * (threads > 1)}",
        "rate": f"{measured['matrix_gflops']:.0f}",
        "recorded": measured["recorded"][:10],
        "took": f"{measured['took'] / 60:.1f}",
    }
