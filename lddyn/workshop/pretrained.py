"""The recorded runs of the book on a real language model, SmolLM2-135M-Instruct: made, and made again.

The settings are the scale `pretrained` of chapters 2, 3, 5 and 7. A run that is in the cache is read, one that was
interrupted continues, and each is kept (`recorded`) as soon as it is there.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lddyn import unknown
from lddyn.chapters.decomposition import run as decomposition
from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.extend import run as extend
from lddyn.chapters.sft import run as sft
from lddyn.data import preferences
from lddyn.engine import gguf, models, pool, pretraining, probes, prose, recipe, recorded, store
from lddyn.engine.probe_set import ProbeSet

LOG = logging.getLogger("lddyn")
Done = Callable[[store.Run], None]


def pieces(given: Mapping[str, object]) -> dict[str, Callable[[Done], object]]:
    """The pieces of the set, what matters most first: "chapter/group", and what computes its runs and tells each.

    `given`: settings in place of those of the scale, such as `seeds`.
    """
    of_sft, of_dpo, extended, decomposed = (
        chapter.settings("pretrained", given) for chapter in (sft, dpo, extend, decomposition)
    )
    files, of_chapter_3 = recipe.files(of_sft), sft.files(of_sft)
    whole, small = sft.grid(of_sft)[: of_sft.seeds], sft.grid(of_sft)[of_sft.seeds :]
    plain = replace(whole[0], format="plain")
    of_first = small[: len(sft.HEAT_MAP_TARGETS)]  # the heat map, on the first seed
    stages = dpo.stage_grid(of_dpo)

    def after_sft(which: slice) -> Callable[[Done], object]:
        return lambda done: pool.run_then(
            recipe.stages, stages, dpo.align, lambda stage: dpo.grid(of_dpo, stage)[which], files, done=done
        )

    def of_chapter_2(done: Done) -> object:
        first, then = decomposition.follow, lambda stage: decomposition.dpo_grid(decomposed, stage)
        return pool.run_then(first, decomposition.grid(decomposed), first, then, files, done=done)

    return {
        "03_sft/main": lambda done: pool.run_all(sft.finetune, whole, of_chapter_3, done=done),
        "05_dpo/after_sft": after_sft(slice(0, 1)),
        "05_dpo/from_chat": lambda done: pool.run_all(dpo.align, dpo.from_base(of_dpo), files, done=done),
        "07_extend/natural": lambda done: pool.run_all(extend.follow, extend.natural_grid(extended), files, done=done),
        "05_dpo/short": after_sft(slice(1, None)),
        "02_decomposition/main": of_chapter_2,
        "03_sft/map": lambda done: pool.run_all(sft.finetune, of_first, of_chapter_3, done=done),
        "03_sft/plain": lambda done: pool.run_all(sft.finetune, [plain], of_chapter_3, done=done),
        "card": lambda _: store.write_json(recorded.CARD, card()),
    }


def card() -> list[dict]:
    """What two models need for a byte of text that neither was finetuned on, nats: rows of the model card.

    Bytes, because their tokens differ. Prose: documents that the pre-training of the built-in model held out, after
    their first sentence; answers: the chosen ones of the test split, in plain text and as an answer in a chat.
    """
    _, held_out = pretraining.documents(prose.versions(pretraining.SIZES["small"]["libraries"]), seed=0)
    parts = [text.partition(". ") for text in held_out if ". " in text][:48]
    tests = preferences.load("builtin", "test", 48)
    texts = {
        "prose": ProbeSet([first + "." for first, _, _ in parts], {"chosen": [" " + rest for *_, rest in parts]}),
        "answers": ProbeSet([e["prompt"] for e in tests], {"chosen": [e["chosen"] for e in tests]}),
    }
    rows = []
    for name in ("builtin", gguf.SMOLLM2):
        model, tokenizer = models.load(name)
        for (what, probed), format in itertools.product(texts.items(), ("plain", "chat")):
            if format == "chat" and (what == "prose" or not tokenizer.chat_template):
                continue
            encoded = probed.encode(tokenizer, 96, 96, format)
            table = probes.measure(model, encoded)
            said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded.responses["chosen"]]
            total, tokens = (table[table.metric == metric].value.sum() for metric in ("logp_sum", "tokens"))
            size = sum(len(text.encode()) for text in said)
            row = {"model": name, "parameters": model.num_parameters(), "vocabulary": len(tokenizer), "text": what}
            rows.append(row | {"format": format, "nats a byte": -total / size, "bytes a token": size / tokens})
    return rows


def expected(piece: str) -> str:
    """How long the recorded runs of a piece took; empty for one without runs."""
    if "/" not in piece:
        return ""
    minutes = sum(run.manifest["seconds"] for run in recorded.read(*piece.split("/"))) / 60
    return f": the recorded runs took {minutes:.0f} minutes together"


def make(names: Sequence[str], given: Mapping[str, object], keep: bool) -> None:
    """Compute the pieces with these names, or all, and print how far each run is from the one that is kept.

    With `keep` it takes its place. Raises `InputError` for an unknown piece.
    """
    known = pieces(given)
    for name in names:
        if name not in known:
            raise unknown("piece", name, known)

    def told(piece: str, run: store.Run) -> None:
        if run.manifest["function"].endswith(":stages"):  # they bring weights, and little to see
            return
        minutes, apart = run.manifest["seconds"] / 60, recorded.compare(run, *piece.split("/"))
        print(f"{piece}/{run.folder.name}: {minutes:.1f} min, {apart}", flush=True)
        if keep:
            recorded.write(run, *piece.split("/"))

    for n, piece in enumerate(names or known, 1):
        LOG.info("%s, piece %d of %d%s", piece, n, len(names or known), expected(piece))
        known[piece](lambda run, piece=piece: told(piece, run))
