import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lddyn import InputError
from lddyn.engine import models
from lddyn.theory import first_order, kernels, losses

torch.set_num_threads(1)
ARCHITECTURES = ["gpt_neox", "llama", "qwen2", "gpt2"]
# prompts and responses of different lengths, so that padding would show
TEXTS = [([5, 9, 4, 30, 7], [8, 3, 0]), ([5, 9], [40, 12, 33, 2, 0]), ([17, 21, 6], [50, 0]), ([4, 4, 9, 9], [3])]
PAIR = ([5, 9, 4, 30, 7], [60, 61, 3, 0])


@pytest.fixture(scope="module")
def lm(model_folder):
    def load(architecture="gpt_neox", dtype=torch.float64):
        return models.load(str(model_folder(architecture)))[0].to(dtype)

    return load


def every_logp(model, theta=None):
    return torch.cat(first_order.logps(model, TEXTS, theta))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prediction_is_the_derivative_that_finite_differences_find(lm, architecture):
    model = lm(architecture)
    update = first_order.step(model, 1e-3, [PAIR])
    change = first_order.predicted_change(model, update, TEXTS)
    in_float32 = architecture in ("llama", "qwen2")  # their RMSNorm is, whatever the dtype
    h, tolerance = (3e-2, 2e-4) if in_float32 else (1e-4, 1e-7)
    ends = [every_logp(model, first_order.stepped(model, first_order.scaled(update, s * h))) for s in (1, -1)]
    numeric, exact = (ends[0] - ends[1]) / (2 * h), torch.cat(change.tokens)
    assert (exact - numeric).abs().max() < tolerance * exact.abs().max()
    torch.testing.assert_close(change.sums, first_order.sums(change.tokens))
    torch.testing.assert_close(change.logps, first_order.sums(first_order.logps(model, TEXTS)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prediction_is_the_explicit_product_a_k_g(lm, architecture):
    model, observation, update = lm(architecture), TEXTS[1], TEXTS[0]
    parts = [
        [kernels.factors(model, observation, update, m, l) for l in range(len(update[1]))]
        for m in range(len(observation[1]))
    ]
    product = torch.stack([sum(f.a @ f.k @ f.g for f in row) for row in parts])  # (tokens, V)
    change = first_order.predicted_change(model, first_order.step(model, 1.0, [update]), [observation])
    of_targets = -product.gather(-1, torch.tensor(observation[1]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(change.tokens[0], of_targets, rtol=1e-6, atol=1e-9)
    (z,) = kernels.logits(model, [observation])
    g = [kernels.residual(kernels.logits(model, [update])[0], update[1])]
    dz = kernels.push_forward(model, kernels.pull_back(model, [update], g), [observation])[0]
    torch.testing.assert_close(kernels.log_changes(z, dz), product, rtol=1e-5, atol=1e-5 * product.abs().max().item())


@pytest.mark.parametrize("name", [name for name, loss in losses.LOSSES.items() if loss.force])
def test_gradient_of_every_loss_is_its_residual_pulled_back(lm, name):
    model, chosen, rejected = lm(), [TEXTS[0]], [PAIR]
    loss, force, *_ = losses.LOSSES[name]
    reference = torch.tensor([-12.0]), torch.tensor([-25.0])
    found = first_order.gradient(model, chosen, rejected, loss, reference)
    logps = [first_order.sums(first_order.logps(model, texts)) for texts in (chosen, rejected)]
    forces = force(*logps, *reference)
    z = kernels.logits(model, chosen + rejected)
    g = [kernels.residual(z[i], text[1], forces[i].item()) for i, text in enumerate(chosen + rejected)]
    closed = kernels.pull_back(model, chosen + rejected, g)
    for parameter, exact in closed.items():
        torch.testing.assert_close(found[parameter], exact, rtol=1e-6, atol=1e-9)


def test_error_of_the_prediction_is_quadratic_in_eta(lm):
    model = lm()
    before, direction, errors = every_logp(model), first_order.step(model, 1.0, [PAIR]), []
    for eta in (1e-3, 1e-4, 1e-5):
        update = first_order.scaled(direction, eta)
        measured = every_logp(model, first_order.stepped(model, update)) - before
        predicted = torch.cat(first_order.predicted_change(model, update, TEXTS).tokens)
        errors.append((measured - predicted).norm().item())
        assert errors[-1] < 0.1 * measured.norm()
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([100, 100], rel=0.2)


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_difference_that_an_optimizer_applies_is_predicted_not_its_gradient(lm, optimizer):
    model = lm()
    opt = OPTIMIZERS[optimizer](model.parameters(), lr=1e-6)
    for _ in range(3):  # so that its state is not fresh
        before, logps = first_order.parameters(model), every_logp(model)
        for name, g in first_order.gradient(model, [PAIR]).items():
            model.get_parameter(name).grad = g
        opt.step()
    update = first_order.difference(before, first_order.parameters(model))
    moved = every_logp(model) - logps
    model.load_state_dict(before, strict=False)
    model.tie_weights()
    predicted = torch.cat(first_order.predicted_change(model, update, TEXTS).tokens)
    torch.testing.assert_close(predicted, moved, rtol=1e-2, atol=1e-3 * moved.abs().max().item())


def test_an_update_of_lora_adapters_alone_is_predicted(lm):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # for the adapters, whatever ran before
    model = get_peft_model(lm(), LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False))
    model = model.double()
    update = first_order.step(model, 1e-4, [PAIR])
    assert update and all("lora" in name for name in update)
    before = every_logp(model)
    moved = every_logp(model, first_order.stepped(model, update)) - before
    predicted = torch.cat(first_order.predicted_change(model, update, TEXTS).tokens)
    torch.testing.assert_close(predicted, moved, rtol=1e-2, atol=1e-2 * moved.abs().max().item())


def test_results_do_not_depend_on_the_batches_or_the_order(lm):
    model = lm()
    update = first_order.step(model, 1e-3, [PAIR])
    together = first_order.predicted_change(model, update, TEXTS)
    alone = first_order.predicted_change(model, update, TEXTS, batch_tokens=1)
    turned = first_order.predicted_change(model, update, TEXTS[::-1])
    torch.testing.assert_close(alone.sums, together.sums)
    torch.testing.assert_close(turned.sums.flip(0), together.sums)
    whole = first_order.gradient(model, TEXTS)
    parts = [first_order.gradient(model, [text]) for text in TEXTS]
    for name, g in whole.items():
        torch.testing.assert_close(g, sum(p[name] for p in parts) / len(TEXTS))


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2", "opt"])
def test_texts_that_share_their_prompt_are_predicted_as_each_alone(lm, architecture, monkeypatch):
    model = lm(architecture)
    texts = [(prompt, response) for prompt, _ in TEXTS[:2] for _, response in TEXTS] + TEXTS[2:]
    update = first_order.step(model, 1e-3, [PAIR])
    alone = first_order.predicted_change(model, update, texts)
    of_logits = kernels.push_forward(model, update, texts)
    monkeypatch.setattr(first_order, "SAVED", 1)
    shared = []
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", spy(DynamicCache.batch_repeat_interleave, shared))
    together = first_order.predicted_change(model, update, texts)
    assert len(shared) == 3  # one trial, two prompts
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(kernels.push_forward(model, update, texts), of_logits, rtol=1e-5, atol=1e-8)


def spy(function, seen):
    def called(*given):
        seen.append(given)
        return function(*given)

    return called


MISTRAL = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
OTHERS = {
    "bloom": {"n_layer": 2, "n_head": 2},
    "mistral": MISTRAL | {"sliding_window": 3},
}  # takes no positions; windows


@pytest.mark.parametrize("architecture", OTHERS)
def test_texts_of_a_model_that_cannot_share_a_prompt_are_as_each_alone(architecture, monkeypatch):
    config = AutoConfig.for_model(architecture, hidden_size=32, vocab_size=64, **OTHERS[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    alone = first_order.logps(model, TEXTS * 2)
    monkeypatch.setattr(first_order, "SAVED", 1)
    torch.testing.assert_close(first_order.logps(model, TEXTS * 2), alone)


def test_kernel_between_two_tokens_equals_its_columns_one_by_one(lm):
    model, (o, u) = lm(), TEXTS[:2]
    exact = kernels.kernel_at(model, o, u, 1, 2)
    for column in (0, 3, 40):
        v = torch.zeros(len(u[1]), exact.shape[1], dtype=exact.dtype)
        v[2, column] = 1
        (product,) = kernels.kernel_product(model, [o], u, v)
        torch.testing.assert_close(product[1], exact[:, column], rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(kernels.kernel_at(model, u, o, 2, 1), exact.T)


def test_interval_of_the_kernel_norm_covers_the_exact_norm(lm):
    model, (o, u) = lm("gpt2"), TEXTS[:2]
    blocks = [kernels.kernel_at(model, o, u, m, l) for m in range(len(o[1])) for l in range(len(u[1]))]
    exact = sum(k.square().sum() for k in blocks).sqrt().item()
    for sketch in (0, 3):
        covered, widths = 0, []
        for seed in range(10):
            (estimate,) = kernels.kernel_norms(model, [o], u, probes=6, sketch=sketch, seed=seed)
            covered += estimate.low <= exact <= estimate.high
            widths.append(estimate.high - estimate.low)
        assert covered >= 8
    assert sum(widths) / 10 < exact / 2
    trace = sum(kernels.kernel_at(model, o, o, m, m).trace() for m in range(len(o[1]))).item()
    estimate = kernels.kernel_trace(model, o, probes=30)
    assert estimate.low <= trace <= estimate.high


def test_lower_bound_holds_and_sign_delta_is_the_mean_change(lm):
    model, update = lm(), TEXTS[0]
    z_u = kernels.logits(model, [update])[0]
    g = kernels.residual(z_u, update[1])
    products = kernels.kernel_product(model, TEXTS, update, -1e-2 * g)
    norms = kernels.kernel_norms(model, TEXTS, update, probes=16)
    for z, dz, k in zip(kernels.logits(model, TEXTS), products, norms, strict=True):
        assert 0 < kernels.lbk(z, dz, g) < 1e-4 * k.low**2
        explicit = torch.func.jvp(lambda v: v.log_softmax(-1), (z,), (dz,))[1]
        torch.testing.assert_close(kernels.log_changes(z, dz), explicit)
        assert kernels.sign_delta(z, dz) == pytest.approx(explicit.mean().item())


def test_gradient_products_say_which_way_one_step_of_dpo_moves_the_chosen_answer(lm):
    model, chosen, rejected = lm(), [TEXTS[0]], [PAIR]
    (between, up, down) = kernels.gradient_products(model, chosen, rejected)[0].tolist()
    update = first_order.step(model, 1.0, chosen, rejected, loss=losses.dpo_loss)
    change = first_order.predicted_change(model, update, chosen + rejected).sums
    force = 0.1 * 0.5  # beta (1 - a) where the reference is the model
    assert change.tolist() == pytest.approx([force * (up - between), force * (between - down)], rel=1e-6)


def test_ches_uses_the_hidden_states_that_predict_the_response(lm):
    model, chosen, rejected = lm("llama"), TEXTS[:2], [PAIR, TEXTS[3]]

    def hidden(text):
        ids = torch.tensor([[*text[0], *text[1]]])
        states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        return states[len(text[0]) - 1 : -1].sum(0)

    expected = [(hidden(a) @ hidden(b) - hidden(a) @ hidden(a)).item() for a, b in zip(chosen, rejected, strict=True)]
    assert kernels.ches(model, chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)
    means = [[hidden(text) / len(text[1]) for text in side] for side in (chosen, rejected)]
    by_length = [(a @ b - a @ a).item() for a, b in zip(*means, strict=True)]
    assert kernels.ches(model, chosen, rejected, normalised=True).tolist() == pytest.approx(by_length, rel=1e-6)


def test_the_model_stays_as_it_was(lm):
    model = lm()
    model.train()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    update = first_order.step(model, 1.0, [PAIR], [TEXTS[1]], loss=losses.dpo_loss)
    first_order.predicted_change(model, update, TEXTS)
    kernels.kernel_at(model, TEXTS[0], PAIR, 0, 0)
    kernels.ches(model, [PAIR], [TEXTS[1]])
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_bad_input_is_one_clear_line(lm):
    model = lm()
    with pytest.raises(InputError, match="no parameter"):
        first_order.predicted_change(model, {"nothing": torch.zeros(1)}, TEXTS)
    with pytest.raises(InputError, match="at least one token"):
        first_order.logps(model, [([], [3])])
    with pytest.raises(InputError, match="at least 2"):
        kernels.kernel_norms(model, TEXTS, PAIR, probes=1)
