import pytest
import torch
from conftest import SHAPES
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from lddyn import InputError
from lddyn.theory import first_order, influences, losses

torch.set_num_threads(1)
# prompts and responses of different lengths, so that padding of batches would show
CHOSEN = [([5, 9, 4, 30, 7], [8, 3, 0]), ([5, 9], [40, 12, 33, 2, 0]), ([17, 21, 6], [50, 0])]
REJECTED = [([5, 9, 4, 30, 7], [60, 61, 3, 0]), ([5, 9], [14, 0]), ([17, 21, 6], [9, 9, 5, 0])]
OBSERVED = [CHOSEN[1], ([4, 4, 9, 9], [3]), ([6, 21, 8], [30, 7, 0]), ([5, 9, 4, 30, 7], [11, 3, 8, 5, 2, 0])]
REFERENCE = torch.tensor([-12.0, -25.0, -6.0]), torch.tensor([-17.0, -9.0, -21.0])
MORE_SHAPES = {
    "gemma2": SHAPES["llama"] | {"head_dim": 8},
    "qwen3_moe": SHAPES["qwen2"]
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "bloom": {"n_layer": 2, "n_head": 2},
}


def lm(architecture="gpt_neox", dtype=torch.float64, **more):
    """A small random model, not at a point where anything is zero."""
    common = {"hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(architecture, **common, **ids, **(SHAPES | MORE_SHAPES)[architecture], **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            nn.init.normal_(p, p.mean().item(), 0.2)
    return model.to(dtype).eval()


def one_by_one(model, loss=losses.dpo_loss, reference=None, observed=OBSERVED):
    """A gradient step on each pair in turn, and a Jacobian-vector product for it."""
    rows = []
    for i, pair in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        of_pair = None if reference is None else tuple(r[i : i + 1] for r in reference)
        update = first_order.step(model, 1.0, *([text] for text in pair), loss=loss, reference=of_pair)
        rows.append(first_order.predicted_change(model, update, observed).sums)
    return torch.stack(rows)


def dpo(model, observed=OBSERVED, **options):
    return influences.influences(model, observed, CHOSEN, REJECTED, losses.dpo_loss, **options)


def close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", losses.LOSSES)
def test_influences_of_every_loss_are_a_jacobian_vector_product_for_each_pair(name):
    model, loss = lm(), losses.LOSSES[name].function
    for reference in (None, REFERENCE):
        found = influences.influences(model, OBSERVED, CHOSEN, REJECTED, loss, reference)
        close(found, one_by_one(model, loss, reference))


TIED = {"tie_word_embeddings": True}
CASES = {  # tolerances in double and single precision; RMSNorm is in single precision always
    "gpt_neox": (TIED, 1e-8, 1e-4),
    "gpt2": (TIED, 1e-8, 1e-4),  # weights of Conv1D lie the other way round, learned positions
    "llama": (TIED, 1e-5, 1e-4),
    "qwen2": ({}, 1e-5, 1e-4),  # biases
    "opt": ({}, 1e-8, 1e-4),  # an embedding of its own kind
    "gemma2": (TIED, 1e-5, 1e-4),  # scaled embeddings, capped logits
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("architecture", CASES)
def test_influences_are_exact_whatever_the_architecture(architecture, dtype):
    more, *tolerances = CASES[architecture]
    model, tolerance = lm(architecture, dtype, **more), tolerances[dtype == torch.float32]
    expected = one_by_one(model)
    for memory in (2**30, 1):  # all at once; layer by layer, two texts at a time
        close(dpo(model, memory=memory), expected, tolerance)


@pytest.mark.parametrize("architecture", ["bloom", "qwen3_moe"])  # layers return tuples; experts share a parameter
def test_influences_are_exact_where_there_are_no_jacobian_vector_products(architecture):
    model = lm(architecture, torch.float32)
    steps = [first_order.gradient(model, [c], [r], losses.dpo_loss) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    gradients = [first_order.gradient(model, [text]) for text in OBSERVED]
    expected = torch.tensor([[first_order.inner(a, b) for b in gradients] for a in steps], dtype=torch.float64)
    close(dpo(model), expected, 1e-4)


class Gained(nn.Module):
    """A module with a parameter of its own around others."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.full((32,), 1.5, dtype=torch.float64))

    def forward(self, x):
        return self.gain * self.inner(x)


class Aside(Gained):
    """One that uses a weight of a linear layer without calling it."""

    def forward(self, x):
        return super().forward(x) + functional.linear(x, self.inner.dense_4h_to_h.weight.T)[..., :32]


class Speaking(Gained):
    """Layers that tell others something beside the hidden states."""

    told = None

    def forward(self, x):
        out = super().forward(x)
        if Speaking.told is not None:
            out = out + 0.3 * Speaking.told
        Speaking.told = None if Speaking.told is not None else out
        return out


@pytest.mark.parametrize("kind", [Gained, Aside, Speaking])
def test_a_parameter_that_is_used_in_an_unknown_way_counts_in_full(kind):
    model = lm()
    for layer in model.gpt_neox.layers:
        layer.mlp = kind(layer.mlp)
    close(dpo(model, memory=1), one_by_one(model))


def test_the_untrained_embedding_of_padding_is_left_out_of_the_step_alone():
    model = lm("llama", dtype=torch.float64)
    assert model.get_input_embeddings().padding_idx == 1
    padded = [([1, *prompt], response) for prompt, response in CHOSEN]
    for text in (padded[0], ([4, 1, 9], [7, 1, 0])):
        update = first_order.step(model, 1.0, [padded[0]])
        expected = first_order.predicted_change(model, update, [text]).sums
        close(influences.influences(model, [text], padded[:1])[0], expected, 1e-5)


def test_influences_on_lora_adapters_are_those_of_the_adapters_alone():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # for the adapters, whatever ran before
    options = {"r": 2, "target_modules": ["query_key_value", "dense"], "init_lora_weights": False}
    model = get_peft_model(lm(), LoraConfig(**options)).double()
    for memory in (2**30, 1):
        close(dpo(model, memory=memory), one_by_one(model))


def test_frozen_parameters_do_not_count():
    model = lm("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_("h.1.mlp" in name or "ln_f" in name)
    close(dpo(model), one_by_one(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        first_order.step(model, 1.0, CHOSEN)
    )


def test_influences_are_what_a_small_step_on_each_pair_does():
    model, eta = lm(), 1e-6
    before = first_order.sums(first_order.logps(model, OBSERVED))
    for row, *pair in zip(dpo(model), CHOSEN, REJECTED, strict=True):
        start, logps = first_order.parameters(model), []
        for prompt, response in pair:
            z = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps.append(z[range(len(response)), response].sum())
        losses.dpo_loss(*logps, *(logp.detach() for logp in logps)).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=eta)
        optimizer.step()
        optimizer.zero_grad()
        moved = (first_order.sums(first_order.logps(model, OBSERVED)) - before) / eta
        close(row, moved, 1e-3)
        model.load_state_dict(start, strict=False)


def test_the_mean_over_pairs_is_the_prediction_for_the_batch():
    model = lm("gpt2")
    update = first_order.step(
        model, 1.0, CHOSEN, REJECTED, loss=losses.simpo_loss, chosen_length=torch.tensor([3, 5, 2])
    )
    found = influences.influences(
        model, OBSERVED, CHOSEN, REJECTED, losses.simpo_loss, chosen_length=torch.tensor([3, 5, 2])
    )
    close(found.mean(0), first_order.predicted_change(model, update, OBSERVED).sums)


def test_influences_do_not_depend_on_memory_order_or_repetition():
    model = lm("llama", dtype=torch.float64, **TIED)
    found = dpo(model)
    for memory in (1, 20_000, 60_000, 200_000):
        close(dpo(model, memory=memory), found, 1e-6)
    close(dpo(model, [*OBSERVED[::-1], OBSERVED[0]]), torch.cat([found.flip(1), found[:, :1]], 1), 1e-6)
    texts = [*CHOSEN, *REJECTED, CHOSEN[0]]
    product = influences.products(model, texts, texts)
    close(product.products, product.products.T, 1e-6)
    close(product.logps, first_order.sums(first_order.logps(model, texts)), 1e-6)
    close(product.other_logps, product.logps, 1e-6)


def test_many_texts_are_multiplied_without_factors_with_the_same_result():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (40, 30), generator=generator).tolist()
    texts, model = [(row[:12], row[12:]) for row in ids], lm(**TIED)
    product = influences.products(model, texts[:4], texts).products
    some = influences.products(model, texts[:1], texts[-1:]).products
    gradients = [first_order.gradient(model, [text]) for text in (texts[0], texts[-1])]
    assert product[0, -1].item() == pytest.approx(first_order.inner(*gradients), rel=1e-8)
    assert some.item() == pytest.approx(product[0, -1].item(), rel=1e-8)


def test_the_model_stays_as_it_was():
    model = lm()
    model.train()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    dpo(model)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_bad_input_is_one_clear_line():
    model = lm()
    with pytest.raises(InputError, match="3 chosen and 2 rejected"):
        influences.influences(model, OBSERVED, CHOSEN, REJECTED[:2], losses.dpo_loss)
    with pytest.raises(InputError, match="at least one token"):
        influences.influences(model, [([], [3])], CHOSEN)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="trainable"):
        influences.influences(model, OBSERVED, CHOSEN)
