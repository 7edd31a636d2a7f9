"""A dialogue is probed as it is trained: our token ids are those that TRL makes of conversational data."""

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lddyn import InputError
from lddyn.data.rows import Dialogue
from lddyn.engine import probes, training
from lddyn.engine.probe_set import ProbeSet, ends_of_turn

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>", "<bos>"]
SPECIAL += ["<turn>", "<end>", "[INST]", "[/INST]", "</s>"]
TEMPLATES = {  # in the manner of
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Llama 3": "<bos>{% for m in messages %}<|start|>{{ m.role }}<|head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}",
    "Gemma": "<bos>{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "Mistral": "<bos>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "Qwen, thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Qwen, not thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
}
USER, MORE = {"role": "user", "content": "Which test?"}, {"role": "user", "content": "And then?"}
ANSWER, SYSTEM = {"role": "assistant", "content": "The first."}, {"role": "system", "content": "Be brief."}
DIALOGUES = [[USER], [SYSTEM, USER], [USER, ANSWER, MORE], [SYSTEM, USER, ANSWER, MORE]]
CHOSEN, REJECTED = "Use the two-sample test.", "No idea, sorry."


@pytest.fixture
def tokenizer_with(tokenizer_of):
    def build(template: str | None):
        tokenizer = tokenizer_of([CHOSEN, REJECTED, "Which test? Be brief."], *SPECIAL)
        tokenizer.chat_template = template
        return tokenizer

    return build


def tiny(tokenizer):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0, **shape))


def message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_token_ids_are_those_of_trl(name, tmp_path, tokenizer_with):
    tokenizer = tokenizer_with(TEMPLATES[name])
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None, "output_dir": str(tmp_path)}
    pairs = [{"prompt": turns, "chosen": message(CHOSEN), "rejected": message(REJECTED)} for turns in DIALOGUES]
    rows = datasets.Dataset.from_list(pairs)
    model = tiny(tokenizer)
    of_dpo = DPOTrainer(
        model, ref_model=tiny(tokenizer), args=DPOConfig(**common), train_dataset=rows, processing_class=tokenizer
    ).train_dataset
    of_sft = SFTTrainer(
        model,
        args=SFTConfig(**common),
        train_dataset=rows.rename_column("chosen", "completion").remove_columns("rejected"),
        processing_class=tokenizer,
    ).train_dataset
    prompts = [Dialogue(turns) for turns in DIALOGUES]
    ours = training.dpo_rows(tokenizer, prompts, [CHOSEN] * 4, [REJECTED] * 4)
    assert [dict(row) for row in ours] == [{k: row[k] for k in ours.column_names} for row in of_dpo]
    for row, theirs in zip(training.sft_rows(tokenizer, prompts, [CHOSEN] * 4), of_sft, strict=True):
        assert (row["input_ids"], row["labels"]) == (theirs["input_ids"], theirs["labels"])


def test_a_plain_prompt_becomes_a_message_of_the_user_only_where_that_is_asked_for(tokenizer_with):
    tokenizer = tokenizer_with(TEMPLATES["ChatML"])
    probes = ProbeSet(["Which test?"], {"chosen": [CHOSEN]})
    plain, chat = probes.encode(tokenizer), probes.encode(tokenizer, format="chat")
    assert tokenizer.decode(plain.prompts[0] + plain.responses["chosen"][0]) == f"Which test? {CHOSEN}{SPECIAL[0]}"
    assert chat == ProbeSet([Dialogue([USER])], {"chosen": [CHOSEN]}).encode(tokenizer)
    assert tokenizer.decode(chat.responses["chosen"][0]) == f"{CHOSEN}<|im_end|>\n"
    flat = ProbeSet([Dialogue([USER])], {"chosen": [CHOSEN]}).encode(tokenizer, format="plain")
    assert tokenizer.decode(flat.prompts[0]) == "Human: Which test?\nAssistant:"


def test_chat_without_a_template_and_unknown_formats_are_one_line(tokenizer_with):
    probes = ProbeSet(["Which test?"], {"chosen": [CHOSEN]})
    with pytest.raises(InputError, match="needs a tokenizer with a chat template"):
        probes.encode(tokenizer_with(None), format="chat")
    with pytest.raises(InputError, match="unknown format 'chatml'; did you mean 'chat'"):
        probes.encode(tokenizer_with(None), format="chatml")
    refuses = tokenizer_with(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="the chat template refuses a dialogue: no system"):
        ProbeSet([Dialogue([SYSTEM, USER])], {"chosen": [CHOSEN]}).encode(refuses)


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer_with):
    tokenizer = tokenizer_with(TEMPLATES["ChatML"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends_of_turn(tokenizer, ["Which test?"], "chat") == {end} and not ends_of_turn(tokenizer, ["Which test?"])
    model = tiny(tokenizer).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[end] = 9.0
    (answer,) = probes.greedy(model, tokenizer, [Dialogue([USER])], 5)
    assert answer.tokens == [end] and answer.text == ""
