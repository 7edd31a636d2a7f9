import json
import shutil
import time
from types import SimpleNamespace

import pytest

from lddyn import InputError
from lddyn.workshop import chat

KEY = "sk-secret-7d1f"


def reply(text):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def server(monkeypatch, serve):
    """What a chat server was asked (`requests`); it answers from the list `script`, its last entry again and again."""
    seen = SimpleNamespace(requests=[], script=[reply(" Other words. ")])

    def answer(path, headers, body):
        seen.requests.append((path, headers, json.loads(body)))
        step = seen.script.pop(0) if len(seen.script) > 1 else seen.script[0]
        return step() if callable(step) else step

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LDDYN_API_URL", f"{serve(answer)}/v1")
    monkeypatch.setenv("LDDYN_API_MODEL", "some-model")
    monkeypatch.setenv("LDDYN_API_KEY", KEY)
    return seen


def test_asks_the_named_model_with_the_key_and_one_user_turn(server):
    assert chat.endpoint(max_tokens=7)("Say it again") == "Other words."
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "Say it again"}],
        "max_tokens": 7,
        "temperature": 0,
    }


def test_busy_and_broken_answers_are_tried_again(server):
    server.script = [(500, {}, b""), (429, {"Retry-After": "0"}, b"{}"), (200, {}, b"<html>"), (200, {}, b'{"a": 1}')]
    server.script.append(reply("at last"))
    assert chat.endpoint(pause=0.001)("?") == "at last"
    assert len(server.requests) == 5


def test_no_answer_after_all_attempts_is_one_line(server):
    server.script = [(503, {}, b'{"error": {"message": "too\\nbusy"}}')]
    with pytest.raises(chat.ChatError) as error:
        chat.endpoint(pause=0.001, retries=2)("?")
    assert "gave no answer in 3 attempts, status 503: too busy" in str(error.value)
    assert "\n" not in str(error.value) and len(server.requests) == 3


def test_a_server_that_never_answers_does_not_hang(server):
    server.script = [lambda: time.sleep(1.0) or reply("late")]
    with pytest.raises(chat.ChatError, match=r"imeout|timed out"):
        chat.endpoint(timeout=0.1, retries=1, pause=0.001)("?")


def test_a_refusal_is_not_tried_again_and_does_not_show_the_key(server):
    server.script = [(401, {}, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode())]
    with pytest.raises(chat.ChatError) as error:
        chat.endpoint()("?")
    assert "status 401: wrong key [key]" in str(error.value) and len(server.requests) == 1


def test_the_key_does_not_follow_a_redirect(server):
    server.script = [(307, {"Location": "http://127.0.0.1:9/elsewhere"}, b"")]
    with pytest.raises(chat.ChatError, match="status 307"):
        chat.endpoint()("?")
    assert len(server.requests) == 1


def test_the_budget_counts_every_request_and_says_so(server):
    ask = chat.endpoint(budget=2)
    ask("one"), ask("two")
    with pytest.raises(InputError, match="budget of 2 requests is used up"):
        ask("three")
    assert len(server.requests) == 2
    assert ask("one") == "Other words.", "what is cached stays free"


def test_a_second_call_reads_the_cache_and_the_key_is_not_in_it(server, runs_folder):
    chat.endpoint()("the same")
    assert chat.endpoint()("the same") == "Other words."
    assert len(server.requests) == 1
    chat.endpoint(max_tokens=9)("the same")
    chat.endpoint()("another")
    assert len(server.requests) == 3
    files = list((runs_folder / "chat").iterdir())
    assert len(files) == 3 and not any(KEY in f.read_text() for f in files)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LDDYN_API_URL", "", "LDDYN_API_URL is not set"),
        ("LDDYN_API_MODEL", " ", "LDDYN_API_MODEL is not set"),
        ("LDDYN_API_URL", "file:///etc/hosts", "must be an address"),
        ("LDDYN_API_URL", "https://me:pw@example.org/v1", "must not hold a user"),
        ("LDDYN_API_URL", "https://example.org/v1?key=abc", "must not hold a user"),
    ],
)
def test_a_bad_environment_is_one_line_before_anything_is_sent(server, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        chat.endpoint()
    assert not server.requests


def test_an_unknown_kind_of_chat_names_the_three_that_exist():
    with pytest.raises(InputError, match="'local:FOLDER', 'local:HUB-ID' or 'endpoint', not 'gpt'"):
        chat.connect("gpt")


def test_a_local_model_is_asked_through_its_template_when_it_has_one(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen2"), folder)
    plain = chat.connect(f"local:{folder}", max_tokens=6)
    first = plain("Question:")
    assert isinstance(first, str) and plain("Question:") == first
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}Answer:"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    templated = chat.local(str(folder), max_tokens=6, cache=False)
    assert templated("Question:") == plain("user: Question:\nAnswer:")


def test_a_prompt_that_does_not_fit_a_local_model_is_one_line(model_folder):
    ask = chat.local(str(model_folder("gpt_neox")), max_tokens=250, cache=False)
    with pytest.raises(InputError, match="do not fit"):
        ask("Question: which test compares?" * 3)
