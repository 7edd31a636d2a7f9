"""Chapter 8: advantages, forces of policy gradients, outputs that are not a softmax, and what the runs do with them."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lddyn import InputError
from lddyn.chapters import claims, sentences
from lddyn.chapters.displacement import evidence
from lddyn.chapters.displacement import run as displacement
from lddyn.data import world
from lddyn.engine import models
from lddyn.engine.settings import derive
from lddyn.theory import losses, policy, softmax

CHAPTER = "08_displacement"


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_advantages_of_a_group_sum_to_zero_and_say_nothing_where_all_are_alike():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = policy.advantages(rewards)
    torch.testing.assert_close(found.sum(1), torch.zeros(4))
    torch.testing.assert_close(found[:2].square().mean(1), torch.ones(2))
    assert (found[2:] == 0).all()


def test_pulls_and_pushes_of_a_group_are_equally_strong_and_add_up():
    advantage = policy.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]]))
    pulls, pushes, both = (policy.part(advantage, sign) for sign in ("right", "wrong", "both"))
    assert (pulls >= 0).all() and (pushes <= 0).all()
    torch.testing.assert_close(pulls.sum(1), -pushes.sum(1))
    torch.testing.assert_close(2 * both, advantage)
    torch.testing.assert_close(pulls + pushes, advantage)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_force_of_a_policy_gradient_is_that_of_the_clipped_objective(clip):
    then, advantage = 0.5 * drawn(200), drawn(200, seed=1)
    now = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    ratio = (now - then).exp()
    objective = advantage * ratio
    if clip:
        objective = torch.minimum(objective, advantage * ratio.clamp(1 - clip, 1 + clip))
    (expected,) = torch.autograd.grad(objective.sum(), now)
    torch.testing.assert_close(policy.force(advantage, (now - then).detach(), clip), expected)


@pytest.mark.parametrize("sign", policy.SIGNS)
def test_expected_residual_is_the_mean_over_what_is_sampled(sign):
    p, rewards = drawn(30).softmax(-1), (drawn(30, seed=2) > 0).double()
    weight = {"right": rewards, "wrong": rewards - 1, "both": rewards - 0.5}[sign]
    mean = sum(p[y] * weight[y] * losses.sft(p, torch.tensor(y)) for y in range(30))
    torch.testing.assert_close(policy.expected_residual(p, rewards, sign), mean)


def test_npo_starts_as_gradient_ascent_and_fades():
    zero = torch.zeros(3, dtype=torch.float64)
    rejected = torch.tensor([0.0, -20.0, -200.0], dtype=torch.float64)
    up, down = losses.npo_force(zero, rejected, zero, zero, beta=0.1)
    assert (up == 0).all() and down[0] == -1 and -0.3 < down[1] < -0.2 and -1e-7 < down[2] < 0


def test_entmax_is_the_distribution_that_its_definition_says():
    """p maximises p z + (4/3) (1 - sum p^1.5): p = (z / 2 - tau)^2 on the support, z / 2 <= tau elsewhere."""
    for scale in (0.1, 1.0, 5.0):
        z = scale * drawn(50, 40)
        p = softmax.entmax(z)
        torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64))
        on = p > 0
        tau = torch.where(on, z / 2 - p.sqrt(), torch.nan)
        torch.testing.assert_close(tau.nan_to_num(-9.0).amax(-1), tau.nan_to_num(99.0).amin(-1))
        assert (z / 2 <= tau.nan_to_num(-99.0).amax(-1, keepdim=True) + 1e-12)[~on].all()


@pytest.mark.parametrize("name", softmax.OUTPUTS)
def test_an_output_gives_back_the_distribution_that_its_logits_are_made_of(name):
    _, output, logits = softmax.OUTPUTS[name]
    p = drawn(20, 40).softmax(-1)
    torch.testing.assert_close(output(logits(p)), p)


@pytest.mark.parametrize("name", softmax.OUTPUTS)
def test_bar_says_which_labels_rise(name):
    alpha, output, logits = softmax.OUTPUTS[name]
    p = drawn(50, 30).softmax(-1)
    y = p.argmin(-1)
    moved = output(softmax.step(logits(p), y, -1e-6, output)) - p
    bar = softmax.bar(p, y, alpha)
    clear = (p - bar.unsqueeze(-1)).abs() > 1e-5
    clear[torch.arange(50), y] = False
    assert ((moved > 0) == (p > bar.unsqueeze(-1)))[clear].all()
    if name == "softmax":
        torch.testing.assert_close(bar, p.square().sum(-1) - p.amin(-1))
    if name == "sparsemax":
        torch.testing.assert_close(bar, torch.zeros(50, dtype=torch.float64))


def test_bar_of_sparsemax_is_the_mean_of_the_support_once_the_pushed_label_is_at_zero():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    assert softmax.bar(p, torch.tensor(3), 2.0) == pytest.approx(1 / 3)


def test_reward_wants_both_facts_and_nothing_false():
    prompt, (first, second) = world.question("Ada", ["pet", "dish"]), (world.facts()["Ada"][a] for a in ("pet", "dish"))
    right = f"The pet of Ada is {first}. For Ada, the dish is {second}."
    other = next(v for v in world.VALUES["dish"] if v != second)
    assert displacement.reward(prompt, right) == 1 and displacement.short(right + " More words.") == right
    for wrong in (right.replace(second, other), f"The pet of Ada is {first}.", right + " Ada the.", ""):
        assert displacement.reward(prompt, wrong) == 0


def test_log_probabilities_are_those_of_the_responses_and_an_update_moves_them_the_way_of_the_force():
    model, _ = models.load(size="world")
    texts = [([5, 6, 7], [8, 9]), ([5, 6], [7, 8, 9, 10])]
    found, inside = displacement.logps(model, texts)
    assert inside.sum(1).tolist() == [2, 4] and (found[~inside] == 0).all()
    z = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found.sum(1)[0], z[2, 8] + z[3, 9], atol=1e-4, rtol=0)
    optimizer, force = torch.optim.SGD(model.parameters(), lr=1e-4), torch.tensor([[1.0], [-1.0]])
    displacement.move(model, optimizer, texts, lambda now: force.expand_as(now), 2, 10.0)
    change = (displacement.logps(model, texts)[0] - found).sum(1)
    assert change[0] > change[1] and (force.squeeze(1) * change).sum() > 0


def test_who_is_forgotten_is_no_one_who_is_to_be_kept():
    about, others = (
        displacement.drawn("train", 1, 40, where)
        for where in (displacement.about_forgotten, lambda e: not displacement.about_forgotten(e))
    )
    names = [{e["prompt"].split(" of ")[1].split("?")[0] for e in each} for each in (about, others)]
    assert names[0] <= set(displacement.FORGOTTEN) and not names[1] & set(displacement.FORGOTTEN)


def test_an_unknown_arm_is_refused_before_anything_is_read(tmp_path):
    c = displacement.settings("smoke", {})
    for function, kind in (
        (displacement.reinforce, displacement.Reinforce),
        (displacement.unlearn, displacement.Unlearn),
    ):
        with pytest.raises(InputError, match="unknown arm 'left'"):
            function(tmp_path, derive(kind, c, seed=0, arm="left"))


def table_of(arms: dict[str, tuple[list[float], list[float]]]) -> pd.DataFrame:
    """log pi of pushed (`train/`) and of other answers (`test/`) at updates 0, 2, 4."""
    rows = [
        (arm, 2 * n, f"{split}/1", "chosen", "logp_sum", value)
        for arm, curves in arms.items()
        for split, values in zip(("train", "test"), curves, strict=True)
        for n, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["arm", "step", "prompt_id", "response_type", "metric", "value"])


def test_what_is_kept_is_compared_where_both_have_forgotten_equally_much():
    table = table_of({"npo": ([-5, -10, -15], [-5, -8, -11]), "ascent": ([-5, -15, -45], [-5, -12, -40])})
    assert evidence.kept_at_equal(table, "npo", "ascent") == pytest.approx(-6 - -7)
    assert evidence.slowing(table, "npo") == pytest.approx(1) and evidence.slowing(table, "ascent") == pytest.approx(3)
    assert evidence.spill(table, "ascent") == pytest.approx(35 / 40)
    with pytest.raises(InputError, match="no run of 'npo, kept'"):
        evidence.kept_at_equal(table, "npo, kept", "npo")


def test_a_seed_gives_the_same_distributions_whatever_was_drawn_before(tmp_path):
    first = displacement.outputs(tmp_path, displacement.Outputs(seed=0, draws=4))
    torch.rand(1)
    assert first.equals(displacement.outputs(tmp_path, displacement.Outputs(seed=0, draws=4)))


@pytest.mark.slow
def test_runs_give_every_claim_of_the_chapter_a_number(tmp_path):
    c, tables = displacement.settings("smoke", {}), []
    for function, kind, arms in (
        (displacement.reinforce, displacement.Reinforce, displacement.ARMS),
        (displacement.unlearn, displacement.Unlearn, displacement.UNLEARNING),
    ):
        tables += [function(tmp_path, derive(kind, c, seed=1, arm=arm)).assign(arm=arm) for arm in arms]
    whole = pd.concat([*tables, displacement.outputs(tmp_path, SimpleNamespace(seed=1, draws=20))], ignore_index=True)
    for part in (part for claim in claims.of_chapter(CHAPTER) for part in claims.parts(claim)):
        value = sentences.value(sentences.statistic(CHAPTER, part["statistic"]), whole, part.get("arguments", {}))
        assert value == value, part["says"]
