"""A prompt that is computed once for both answers of a pair gives the same hidden states and gradients."""

import pytest
import torch

from lddyn.engine import models, probes, training

PROMPTS = [[5, 6, 7, 8], [9, 5]]
CHOSEN, REJECTED = [[3, 4, 5], [6, 7, 8, 9]], [[3, 8], [2, 4, 6, 3, 3]]
BOTH = [(p + c, p + r) for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]


def batch():
    return probes.padded([text for side in zip(*BOTH, strict=True) for text in side], torch.device("cpu"))


def test_a_row_is_prompt_chosen_rejected_and_an_answer_sees_its_prompt_and_itself():
    ids, mask = batch()
    packed = training.pack(ids, mask)
    assert packed.ids[0, :8].tolist() == [5, 6, 7, 8, 3, 4, 5, 8]  # both answers begin with 3
    assert packed.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 5]
    assert packed.sees[0, 7, :8].tolist() == [True] * 5 + [False, False, True]
    for row, text in enumerate(text for side in zip(*BOTH, strict=True) for text in side):
        assert packed.ids[row % 2][packed.place[row, : len(text)]].tolist() == text


def gradients(model, packed: bool):
    ids, mask = batch()
    model.zero_grad()
    with training.packed_pairs(model, BOTH) if packed else torch.enable_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logps = model.get_output_embeddings()(hidden).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        (logps * mask[:, 1:] * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])).sum().backward()
    return hidden[mask.bool()].detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "qwen2", "gpt2"])
def test_the_gradients_of_a_pair_are_those_of_two_texts(architecture, attention, model_folder, monkeypatch):
    model, _ = models.read(str(model_folder(architecture)), attention=attention)
    sizes, inner = [], model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda **t: sizes.append(t["input_ids"].numel()) or inner(**t))
    hidden, gradient = gradients(model, packed=True)
    assert sizes[-1] == 2 * 11 < batch()[0].numel()  # it was packed
    torch.testing.assert_close(hidden, gradients(model, packed=False)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, gradients(model, packed=False)[1], rtol=1e-3, atol=1e-6)


def test_a_model_with_a_short_window_is_left_as_it_is(model_folder):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=2,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    before = model.base_model.forward
    with training.packed_pairs(model, BOTH):
        assert model.base_model.forward == before


def test_what_is_no_batch_of_pairs_is_computed_as_ever(model_folder):
    model, _ = models.read(str(model_folder("llama")))
    ids = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 6, 9]])
    with torch.no_grad():
        then = model(input_ids=ids).logits
        with training.packed_pairs(model, BOTH):
            assert torch.equal(model(input_ids=ids).logits, then)
            text = {"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}
            assert torch.equal(model(**text, use_cache=True).logits, then[:2])
        assert "forward" not in vars(model.base_model)
