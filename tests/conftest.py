import os
from functools import cache

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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A function from an architecture of `SHAPES` to the folder of a small random model with a byte-level tokenizer."""

    @cache
    def build(architecture: str):
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp(architecture)
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<|endoftext|>", "<|pad|>"]
        every_byte = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=every_byte, show_progress=False)
        bpe.train_from_iterator([TEXT], trainer)
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1]).save_pretrained(
            folder
        )
        common = {"hidden_size": 32, "vocab_size": bpe.get_vocab_size(), "max_position_embeddings": 256}
        ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
        config = AutoConfig.for_model(architecture, **common, **ids, **SHAPES[architecture])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return build
