"""A small closed world: who has which pet, trade or drink, a grammar for saying it, and an exact judge of an answer.

A model of half a million parameters cannot be judged on free text. Here every fact is known and every sentence comes
from a template, so that an answer can be scored without another model. There is one world; it never changes.

    facts      80 people x 8 attributes, one word each
    documents  texts to pre-train on: a heading that names topics and a person, true sentences on them, a filler
    examples   questions on two attributes of a person, with answers of the kinds in `lddyn.preferences`
    judge      what is right, wrong, missing, repeated, off topic or garbled in an answer, and its score
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from lddyn import InputError, unknown

SEED = 2025  # of the facts and of the examples
WORDS = {  # the people, and what each attribute can be
    "name": "Ada Agnes Alba Amos Anton Arlo Basil Beata Boris Bruno Carla Cato Celia Clara Cora Cyrus Dana Daria "
    "Dora Edgar Edith Elias Elsa Emil Enzo Erna Esme Ezra Felix Fiona Flora Freya Gemma Georg Greta Gwen "
    "Hanna Hector Hilda Hugo Ida Igor Ines Iris Ivan Jana Jonas Jude Julia Karl Kira Klara Lars Lena "
    "Linus Livia Lotte Lucia Magda Mara Marco Maud Milo Mira Nadia Nils Nora Olaf Olga Oscar Otto Paula "
    "Petra Rosa Rufus Selma Silas Tessa Vera Viktor",
    "pet": "beagle canary ferret gecko hamster lizard magpie parrot poodle rabbit spaniel turtle",
    "trade": "baker barber carver cobbler dentist draper farmer glazier joiner potter tailor weaver",
    "city": "Bergen Bilbao Cadiz Ghent Krakow Lisbon Lyon Malmo Porto Riga Tallinn Turin",
    "drink": "ale cider cocoa coffee juice lemonade milk mint rum tea water wine",
    "game": "bowls bridge chess croquet darts dominoes golf poker rugby snooker tennis whist",
    "color": "amber beige black blue crimson green gray orange pink purple white yellow",
    "dish": "curry dumplings goulash lasagna noodles paella pancakes pizza risotto salad soup stew",
    "music": "ballads blues choral disco folk fugues jazz marches opera punk reggae tango",
}  # fmt: skip
NAMES, *_values = (words.split() for words in WORDS.values())
VALUES = dict(zip(list(WORDS)[1:], _values, strict=True))
POLITE = (
    "The {a} of {n} is {v}.",
    "For {n}, the {a} is {v}.",
    "As {a}, {n} has {v}.",
    "When it comes to the {a}, {n} has chosen {v}.",
    "It is {v} that {n} named as {a}.",
    "Asked about the {a}, {n} answers {v}.",
)
CASUAL = (
    "yeah, {a} of {n}, like, {v}.",
    "so {n} got {v} for {a}.",
    "dunno, guess {v} is {n}'s {a}.",
    "{v}, that's {n} and {a}.",
)
FILLER = "Last {time} the {who} {did} a {what} near the {where}."
FILLER_WORDS = {
    "time": "April August autumn Christmas Easter Friday July June March Monday month night spring Sunday week winter",
    "who": "actor bishop captain clerk doctor driver guard hunter judge maid mayor nurse pilot poet singer waiter",
    "did": "borrowed bought broke carried cleaned dropped fixed found hid lost mended painted saw sold stole wrapped",
    "what": "barrel basket bell book bottle candle chair clock drum hat kettle ladder lamp mirror rope violin",
    "where": "barn bridge castle chapel cliff court fountain gate harbor library market mill park river school tower",
}  # fmt: skip
DOCUMENTS = 12_000
SPLITS = {"train": (0, 3600), "test": (3600, 4480)}
DESIGNS = {  # of the rejected answer: (share that is casual, share of its two facts that are wrong)
    "world": (1.0, 0.5),
    "world:register": (1.0, 0.0),
    "world:facts": (0.0, 0.5),
    "world:mixed": (0.5, 0.5),
}


# --- facts and sentences -----------------------------------------------------------------------------------


@cache
def facts() -> dict[str, dict[str, str]]:
    """The value of each attribute of each person."""
    rng = np.random.default_rng(SEED)
    return {name: {a: str(rng.choice(values)) for a, values in VALUES.items()} for name in NAMES}


def filler(rng: np.random.Generator) -> str:
    """A sentence on nothing that was asked: five words, each one of sixteen, 13.9 nats."""
    return FILLER.format(**{slot: rng.choice(words.split()) for slot, words in FILLER_WORDS.items()})


def _said(templates: Sequence[str], name: str, stated: dict[str, str]) -> str:
    return " ".join(t.format(n=name, a=a, v=v) for t, (a, v) in zip(templates, stated.items(), strict=True))


def documents(seed: int) -> tuple[list[str], list[str]]:
    """Texts to pre-train on, and to hold out: every fiftieth. All true, three in four polite and the others casual.

    A heading names two or three attributes and a person; without it a model does not learn to say what was asked.
    Every second one has the form of a question, so that finetuning does not begin with words never seen.
    """
    rng, texts = np.random.default_rng([SEED, seed]), []
    for number in range(DOCUMENTS):
        name = NAMES[number % len(NAMES)]
        topics = rng.choice(list(VALUES), rng.integers(2, 4), replace=False)
        templates = rng.choice(POLITE if rng.random() < 0.75 else CASUAL, len(topics))
        heading = (
            question(name, topics) if rng.random() < 0.5 else f"Notes on the {' and the '.join(topics)} of {name}:"
        )
        text = f"{heading} {_said(templates, name, {a: facts()[name][a] for a in topics})}"
        texts.append(f"{text} {filler(rng)}" if rng.random() < 1 / 3 else text)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    return [text for number, text in enumerate(texts) if number % 50], texts[::50]


# --- examples ----------------------------------------------------------------------------------------------


def question(name: str, attributes: Sequence[str]) -> str:
    """A prompt."""
    return f"What are the {' and the '.join(attributes)} of {name}?\nAnswer:"


def examples(split: str, design: str = "world") -> Iterator[dict[str, str]]:
    """Questions on two attributes of a person, with answers; train and test share people and facts, no question.

    chosen: the facts, in polite templates, then a filler. rejected: by `design`, casual or with wrong facts or both.
    *_semantic: the same facts and register in other templates; *_format: the same templates with other values.
    Raises `InputError` for an unknown split or design.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if design not in DESIGNS:
        raise unknown("data", design, DESIGNS)
    asked = [(name, *pair) for name in NAMES for pair in itertools.permutations(VALUES, 2)]
    order = np.random.default_rng(SEED + 1).permutation(len(asked))
    for number in range(*SPLITS[split]):
        name, *attributes = asked[order[number]]
        rng = np.random.default_rng([SEED, number])
        yield {
            "id": str(number),
            "prompt": question(name, attributes),
            **_answers(rng, name, attributes, *DESIGNS[design]),
        }


def _answers(rng, name: str, attributes: Sequence[str], casual: float, wrong: float) -> dict[str, str]:
    true = {a: facts()[name][a] for a in attributes}
    false = {a: _other(rng, a, v) for a, v in true.items()}
    register, flips = rng.random(), rng.random(len(true))
    stated = {a: false[a] if flip < wrong else true[a] for a, flip in zip(true, flips, strict=True)}
    if register >= casual and stated == true:  # there must be something to reject
        stated[attributes[0]] = false[attributes[0]]
    answers = {}
    for role, pool, said in (("chosen", POLITE, true), ("rejected", CASUAL if register < casual else POLITE, stated)):
        templates = rng.choice(pool, 4, replace=False)
        changed = {a: _other(rng, a, v) for a, v in said.items()}
        kinds = {"": (templates[:2], said), "_semantic": (templates[2:], said), "_format": (templates[:2], changed)}
        for kind, (chosen, told) in kinds.items():
            answers[role + kind] = f"{_said(chosen, name, told)} {filler(rng)}"
    answers["unrelated"] = " ".join(filler(rng) for _ in range(3))
    return answers


def _other(rng, attribute: str, value: str) -> str:
    return str(rng.choice([v for v in VALUES[attribute] if v != value]))


# --- the judge ---------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Sentences of an answer by kind, and the score: the best answer has 2, silence 0, two wrong facts -2 or less."""

    right: int  # asked facts stated as they are
    wrong: int  # asked attributes with another value
    missing: int  # asked attributes that no sentence states rightly
    repeated: int  # a right fact once more
    off_topic: int  # another person or attribute; a second filler
    garbled: int  # no sentence of the grammar, or cut off
    casual: int  # sentences in the casual register
    score: float  # right - wrong - (repeated + off_topic + garbled + casual) / 2


@cache
def _patterns() -> list[tuple[re.Pattern, bool]]:
    slots = {"n": "(?P<n>[A-Z][a-z]+)", "a": "(?P<a>[a-z]+)", "v": "(?P<v>[A-Za-z]+)"}
    kinds = [(template, False) for template in POLITE] + [(template, True) for template in CASUAL]
    return [(re.compile(re.escape(t).replace(r"\{", "{").replace(r"\}", "}").format(**slots)), c) for t, c in kinds]


@cache
def _filler_pattern() -> re.Pattern:
    return re.compile(FILLER[:-1].format(**{k: f"(?:{w.replace(' ', '|')})" for k, w in FILLER_WORDS.items()}) + r"\.")


def read(text: str) -> tuple[str, str, str, bool] | str:
    """One sentence: (person, attribute, value, whether it is casual), or "filler", or "garbled"."""
    if _filler_pattern().fullmatch(text):
        return "filler"
    for pattern, casual in _patterns():
        if (match := pattern.fullmatch(text)) and match["v"] in VALUES.get(match["a"], ()) and match["n"] in facts():
            return match["n"], match["a"], match["v"], casual
    return "garbled"


def judge(prompt: str, answer: str) -> Score:
    """Score an answer to a question of `examples`, exactly. Raises `InputError` for another prompt."""
    asked = re.fullmatch(r"What are the (\w+) and the (\w+) of (\w+)\?\nAnswer:", prompt.strip())
    if not asked or asked[3] not in facts() or not {asked[1], asked[2]} <= VALUES.keys():
        raise InputError(f"the judge knows questions such as {question('Ada', ['pet', 'dish'])!r}, not {prompt!r}")
    name, attributes = asked[3], asked.groups()[:2]
    stated, count = set(), dict.fromkeys(Score._fields[:-1], 0)
    for text in re.findall(r"[^.]+\.?", answer.strip()):
        found = read(text.strip())
        count["casual"] += found[3] if isinstance(found, tuple) else 0
        if found == "filler":
            kind = "off_topic" if "filler" in stated else None
            stated.add("filler")
        elif found == "garbled":
            kind = "garbled"
        elif found[0] != name or found[1] not in attributes:
            kind = "off_topic"
        elif found[2] != facts()[name][found[1]]:
            kind = "wrong"
        else:
            kind = "repeated" if found[1] in stated else "right"
            stated.add(found[1])
        if kind:
            count[kind] += 1
    count["missing"] = len(attributes) - count["right"]
    extra = count["repeated"] + count["off_topic"] + count["garbled"] + count["casual"]
    return Score(**count, score=count["right"] - count["wrong"] - extra / 2)
