import contextlib
import json
import os
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no network; read when huggingface_hub is imported

SHAPES = {
    "gpt_neox": {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama": {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32},
}
TEXT = "Question: Which test compares the means of two groups?\nAnswer: Use the two-sample test, which compares means. "


@pytest.fixture(autouse=True)
def _figures_are_closed():
    """pyplot keeps every figure, and warns when there are many, in whichever test comes then."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def tokenizer_of():
    """A function from texts and special tokens, end of text first and padding second, to a byte-level tokenizer."""

    def build(texts: list[str], *special: str, vocab_size: int = 30_000):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        every_byte = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), **every_byte)
        bpe.train_from_iterator(texts, trainer)
        ends = dict(zip(("eos_token", "pad_token"), special, strict=False))
        return PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)

    return build


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_of):
    """A function from an architecture of `SHAPES` to the folder of a small random model with a byte-level tokenizer."""

    @cache
    def build(architecture: str):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(architecture)
        tokenizer = tokenizer_of([TEXT], "<|endoftext|>", "<|pad|>")
        tokenizer.save_pretrained(folder)
        common = {"hidden_size": 32, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
        ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
        config = AutoConfig.for_model(architecture, **common, **ids, **SHAPES[architecture])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return build


def pytest_collection_modifyitems(items):
    """What takes long starts first, so that the other process is not idle at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch):
    """The runs of a test go to a folder of its own, whatever ran before or runs beside it."""
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes rows to a JSON Lines file of this test."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def pairs():
    """A function from a number to rows of preferences about cats; the last `test` of them belong to the test split."""

    def rows(count: int, test: int = 0, kinds: tuple[str, ...] = ()) -> list[dict]:
        return [
            {
                "prompt": f"Question: how many legs have {n} cats?\nAnswer:",
                "chosen": f"They have {4 * n} legs, four for each of the cats.",
                "rejected": f"They have {2 * n} legs, two for each of the cats.",
                **{kind: f"Of {n} cats this is a text of the kind {kind}." for kind in kinds},
                **({"split": "test" if n > count - test else "train"} if test else {}),
            }
            for n in range(1, count + 1)
        ]

    return rows


@pytest.fixture
def serve():
    """A function that answers HTTP on this machine with `answer(path, headers, body) -> (status, headers, bytes)`.

    It returns the address, with a port that was free.
    """
    servers = []

    def start(answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers, content = answer(self.path, dict(self.headers), body)
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
