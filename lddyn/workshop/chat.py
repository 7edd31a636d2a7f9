"""Ask a chat model: one on this machine, or one behind an OpenAI-compatible address.

    ask = chat.local("path/to/model")      # any causal model of transformers, through its chat template if it has one
    ask = chat.endpoint()                  # LDDYN_API_URL, LDDYN_API_MODEL and, where one is needed, LDDYN_API_KEY
    text = ask("Say it in other words: ...")

Answers are kept in `runs/chat/`, by model and prompt, so that an interrupted job continues without asking twice. The
key is sent to the address and appears nowhere else.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lddyn import InputError
from lddyn.engine import models, store

TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 60.0  # seconds


class ChatError(RuntimeError):
    """The model behind an address gave no answer; one line saying why."""


class Chat(NamedTuple):
    """A chat model: call it with a prompt. `name` tells models apart in the cache and in manifests."""

    name: str
    answer: Callable[[str], str]
    cache: Path | None = None

    def __call__(self, prompt: str) -> str:
        if self.cache is None:
            return self.answer(prompt)
        digest = hashlib.sha256(json.dumps([self.name, prompt]).encode()).hexdigest()
        path = self.cache / f"{digest[:32]}.json"
        if path.exists():
            return json.loads(path.read_text())["answer"]
        answer = self.answer(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(path, {"model": self.name, "prompt": prompt, "answer": answer})
        return answer


def connect(chat: str, max_tokens: int = 256, device: str = "cpu", budget: int | None = None) -> Chat:
    """`local:FOLDER`, `local:HUB-ID` or `endpoint` as a model to ask. Raises `InputError` for anything else."""
    kind, _, model = chat.partition(":")
    if kind == "local" and model:
        return local(model, device=device, max_tokens=max_tokens)
    if chat == "endpoint":
        return endpoint(max_tokens=max_tokens, budget=budget)
    raise InputError(f"chat is 'local:FOLDER', 'local:HUB-ID' or 'endpoint', not {chat!r}")


def _folder(cache: Path | bool) -> Path | None:
    return (store.runs_root() / "chat" if cache is True else Path(cache)) if cache else None


# --- on this machine ---------------------------------------------------------------------------------------


def local(
    model: str, device: str = "cpu", dtype: str = "float32", max_tokens: int = 256, cache: Path | bool = True
) -> Chat:
    """A causal model of `transformers`: a folder, a hub id or "builtin". Greedy decoding, at most `max_tokens` tokens.

    The prompt is one user turn of the tokenizer's chat template; without a template it is continued as plain text.
    Raises `InputError` when there is no such model, or when prompt and answer do not fit it.
    """
    import torch

    lm, tokenizer = models.load(model, device=device, dtype=dtype)
    room = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    content = {name: store.file_hash(path) for name, path in models.inputs(model).items()}
    made_of = hashlib.sha256(json.dumps([content, dtype, max_tokens]).encode()).hexdigest()[:12]

    def answer(prompt: str) -> str:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True).input_ids
        else:
            ids = tokenizer(prompt).input_ids
        if len(ids) + max_tokens > room:
            raise InputError(
                f"a prompt of {len(ids)} tokens and {max_tokens} to answer do not fit {model!r}, which takes {room}"
            )
        ids = torch.tensor([ids], device=lm.device)  # (1, tokens)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = lm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id, **greedy,
        )  # fmt: skip
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()

    return Chat(f"local {model} {made_of}", answer, _folder(cache))


# --- behind an address -------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *_):
        return None


def endpoint(
    max_tokens: int = 256,
    timeout: float = 60.0,
    retries: int = 4,
    budget: int | None = None,
    cache: Path | bool = True,
    pause: float = 1.0,
) -> Chat:
    """An OpenAI-compatible `/chat/completions`, named by the environment; temperature 0.

    `LDDYN_API_URL` is the address up to and without `/chat/completions` (such as `http://127.0.0.1:8000/v1`),
    `LDDYN_API_MODEL` the model; `LDDYN_API_KEY` is sent as a bearer token where it is set. Each request may take
    `timeout` seconds; busy servers, lost connections and answers that are not JSON are tried again `retries` times,
    `pause`, 2 `pause`, 4 `pause`, ... seconds later or when the server says. `budget`: the most requests, with those
    that are tried again. Raises `InputError` when the environment lacks something or the budget is used up,
    `ChatError` when there is no answer.
    """
    url, model = (os.environ.get(name, "").strip() for name in ("LDDYN_API_URL", "LDDYN_API_MODEL"))
    key = os.environ.get("LDDYN_API_KEY", "").strip()
    for name, value in {"LDDYN_API_URL": url, "LDDYN_API_MODEL": model}.items():
        if not value:
            raise InputError(f"the environment variable {name} is not set; chat='endpoint' needs it")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("LDDYN_API_URL must be an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.query:
        raise InputError("LDDYN_API_URL must not hold a user, password or query; the key belongs in LDDYN_API_KEY")
    address = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(_NoRedirect)
    sent, lock = 0, threading.Lock()

    def clean(text: str) -> str:
        return text.replace(key, "[key]") if key else text

    def spend() -> None:
        nonlocal sent
        with lock:
            if budget is not None and sent >= budget:
                raise InputError(
                    f"the budget of {budget} requests is used up; answers so far are kept, a second call continues"
                )
            sent += 1

    def post(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": turns, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with opener.open(request, timeout=timeout) as response:
            return clean(_content(response.read()))

    def answer(prompt: str) -> str:
        why = ""
        for attempt in range(retries + 1):
            wait = pause * 2**attempt
            spend()
            try:
                return post(prompt)
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {clean(_reason(error))}"
                if error.code not in TRY_AGAIN:
                    raise ChatError(f"{model} at {address} refused, {why}") from None
                wait = _retry_after(error, wait)
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = clean(f"{type(error).__name__}: {error}".splitlines()[0])
            if attempt < retries:
                time.sleep(min(wait, LONGEST_PAUSE))
        raise ChatError(f"{model} at {address} gave no answer in {retries + 1} attempts, {why}")

    return Chat(f"endpoint {model} {address} {max_tokens}", answer, _folder(cache))


def _content(raw: bytes) -> str:
    """The text of an answer; raises `ValueError` when there is none."""
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no choices[0].message.content ({error!r})") from error
    if not isinstance(content, str):
        raise ValueError(f"the content is of type {type(content).__name__}, not a text")
    return content.strip()


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says, or the standard phrase, on one line."""
    try:
        said = json.loads(error.read(10_000))["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        said = error.reason
    return " ".join(str(said).split())[:200]


def _retry_after(error: urllib.error.HTTPError, default: float) -> float:
    try:
        return max(0.0, float(error.headers.get("Retry-After", default)))
    except (TypeError, ValueError):
        return default
