"""The hub's clients, with and without a network."""

import contextlib


def first_line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextlib.contextmanager
def hub_or_cache():
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
