"""Learning dynamics of LLM finetuning: the helper package of the companion.

Rooms, imports only go down: theory and data, engine, chapters, workshop, publish, __main__.
"""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator

# before transformers and TRL are imported: TRL tells the hub of each trainer that is built
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"

# the hub's client asks for Jupyter widgets, which would make the book's pages load scripts from outside
warnings.filterwarnings("ignore", message="IProgress not found")


class Caution(UserWarning):
    """What somebody who reads the numbers must know; a page shows it as such (`display`, manifest `cautions`)."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what is allowed."""


def unknown(kind: str, name: object, allowed: Iterable[object]) -> InputError:
    """The error for a name that is not known: the nearest one that is, and the whole choice."""
    from difflib import get_close_matches

    names = [str(a) for a in allowed]
    near = get_close_matches(str(name), names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}{hint} (allowed: {', '.join(names)})")


def first_line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let the hub's clients go to their cache at once where there is no network; they would retry for 20 s."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    if not before:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # whatever the client calls it: no name, no route, refused, timed out
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
