"""The squeezing effect: the step, Lemma 1, the law and its threshold, as properties of random distributions."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lddyn import InputError
from lddyn.chapters import claims, sentences
from lddyn.chapters.squeezing import run as squeezing
from lddyn.chapters.squeezing import steps
from lddyn.engine import store
from lddyn.publish import notebooks
from lddyn.theory import influence, losses, softmax

STATIC = Path(__file__).parents[2] / "book" / "static"


def draw(vocab: int, seed: int = 0, draws: int = 20):
    """Logits, labels and negative step sizes."""
    random = torch.Generator().manual_seed(seed)
    scale = 0.1 + 4 * torch.rand(draws, 1, generator=random, dtype=torch.float64)
    z = scale * torch.randn(draws, vocab, generator=random, dtype=torch.float64)
    eta = -(10 ** (4 * torch.rand(draws, 1, generator=random, dtype=torch.float64) - 3))
    return z, torch.randint(vocab, (draws,), generator=random), eta


def change(z, y, eta):
    return softmax.step(z, y, eta).log_softmax(-1) - z.log_softmax(-1)


def at(values, label):
    return values.gather(-1, label.unsqueeze(-1)).squeeze(-1)


def test_the_step_is_gradient_descent_on_the_readout():
    torch.manual_seed(0)
    w, phi, y = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.tensor(3)
    w.requires_grad_()
    cross_entropy(phi @ w, y).backward()
    after = phi @ (w.detach() - 0.3 * w.grad)
    torch.testing.assert_close(softmax.step((phi @ w).detach(), y, 0.3 * phi.square().sum()), after)


@pytest.mark.parametrize("vocab", [3, 10, 1000, 50_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_lemma_1_is_exact_for_both_signs(vocab, sign):
    z, y, eta = draw(vocab)
    eta, logp = sign * eta, z.log_softmax(-1)
    for i in (y, softmax.top_other(z, y), torch.zeros_like(y)):
        alpha = softmax.log_alpha(logp, y, eta, i)
        torch.testing.assert_close(alpha, at(change(z, y, eta), i), atol=1e-12, rtol=0)


def test_first_order_law_is_minus_eta_a_g_and_its_error_is_of_order_two():
    z, y, _ = draw(20)
    p = z.softmax(-1)
    a, g = influence.normalization(p), losses.sft(p, y)
    torch.testing.assert_close(softmax.first_order(p, y, -0.1), 0.1 * (a @ g.unsqueeze(-1)).squeeze(-1))
    large, small = ((change(z, y, -e) - softmax.first_order(p, y, -e)).norm() for e in (1e-3, 1e-4))
    assert large / small == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("vocab", [3, 50, 1000, 50_000])
def test_pushed_label_falls_and_top_rises(vocab):
    z, y, eta = draw(vocab, seed=1)
    moved = change(z, y, eta)
    assert (at(moved, y) < 0).all()
    assert (at(moved, softmax.top_other(z, y)) > 0).all()


@pytest.mark.parametrize("vocab", [3, 50, 50_000])
def test_threshold_says_who_rises(vocab):
    z, y, eta = draw(vocab, seed=2)
    logp, moved = z.log_softmax(-1), change(z, y, eta)
    other = torch.arange(vocab) != y.unsqueeze(-1)
    above = logp.exp() > softmax.threshold(logp, y, eta).unsqueeze(-1)
    assert (above == (moved > 0))[other & (moved.abs() > 1e-12)].all()


def test_threshold_climbs_from_the_law_to_the_top():
    z, y, _ = draw(50, seed=3)
    logp = z.log_softmax(-1)
    p = logp.exp()
    values = torch.stack([softmax.threshold(logp, y, -e) for e in (1e-6, 0.1, 1.0, 10.0, 1e6)])
    assert (values.diff(dim=0) > 0).all()
    torch.testing.assert_close(values[0], p.square().sum(-1) - at(p, y), atol=1e-5, rtol=0)
    torch.testing.assert_close(values[-1], at(p, softmax.top_other(p, y)), atol=1e-4, rtol=0)


def test_uniform_raises_all_and_a_peak_raises_one():
    uniform, y = torch.zeros(50, dtype=torch.float64), torch.tensor(7)
    assert (change(uniform, y, -3.0) > 0).sum() == 49
    assert (change(softmax.zipf(50, 2.6), torch.tensor(49), -3.0) > 0).sum() == 1


def test_less_likely_label_makes_others_fall_more_and_top_rise_less():
    z, y = softmax.zipf(50, 1.0), torch.tensor(20)
    top, others, share = [], [], []
    for p_y in (0.4, 0.1, 0.01, 1e-5):
        pushed = softmax.with_pushed(z, y, p_y)
        before, moved = pushed.softmax(-1), change(pushed, y, -1.0)
        assert before[y] == pytest.approx(p_y) and before.sum() == pytest.approx(1)
        torch.testing.assert_close(before[0] / before[1], torch.tensor(2.0, dtype=torch.float64))
        top.append(moved[0])
        others.append(moved[[i for i in range(1, 50) if i != 20]].mean())
        share.append(softmax.account(before, before * moved.exp(), y).share)
    assert top == sorted(top, reverse=True) and others == sorted(others, reverse=True) and share == sorted(share)
    assert share[0] == 0 and share[-1] > 0.99


def test_equal_forces_in_one_context_move_two_logits_only():
    z = softmax.zipf(50, 2.6)
    p, plus, minus = z.softmax(-1), torch.tensor(40), torch.tensor(49)
    moved = 3.0 * (losses.sft(p, minus) - losses.sft(p, plus))
    assert moved[plus] == pytest.approx(3) and moved[minus] == pytest.approx(-3)
    assert moved[:40].abs().max() < 1e-15


def test_top_other_skips_the_pushed_label_in_log_probabilities_too():
    p = torch.tensor([0.7, 0.2, 0.1]).log()
    assert softmax.top_other(p, torch.tensor(0)) == 1
    assert softmax.top_other(p, torch.tensor(1)) == 0


def test_account_says_who_paid():
    before, after = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.05, 0.05])
    balance = softmax.account(before, after, torch.tensor(2))
    torch.testing.assert_close(torch.stack(list(balance)), torch.tensor([0.4, 0.15, 0.25]))
    assert balance.share == pytest.approx(0.625)


def test_sparsemax_projects_on_the_simplex():
    p = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(softmax.sparsemax(p), p)
    z, *_ = draw(30, seed=4)
    p = softmax.sparsemax(z)
    assert (p >= 0).all() and (p == 0).any()
    torch.testing.assert_close(p.sum(-1), torch.ones(20, dtype=torch.float64))
    # optimality: z - p equals one number on the support and is at most that elsewhere
    tau = (z - p).amax(-1, keepdim=True)
    torch.testing.assert_close((z - p)[p > 0], tau.expand_as(p)[p > 0])


def test_residual_of_the_matching_losses_is_p_minus_y():
    """Sparsemax loss <p, z> - ||p||^2 / 2 - z_y, and binary cross-entropy of every label."""
    z, y, _ = draw(8, seed=5)
    z.requires_grad_()
    p = softmax.sparsemax(z)
    (g,) = torch.autograd.grad(((p * z).sum(-1) - p.square().sum(-1) / 2 - at(z, y)).sum(), z)
    torch.testing.assert_close(g, losses.sft(p.detach(), y))
    target = torch.nn.functional.one_hot(y, 8).double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, target, reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(bce, z)[0], losses.sft(z.detach().sigmoid(), y))


def test_sigmoid_does_not_squeeze_and_sparsemax_does_even_from_zero():
    y = torch.tensor(3)
    p = torch.tensor([0.6, 0.3, 0.1, 1e-6], dtype=torch.float64)
    sigmoid = softmax.step(p.logit(), y, -1.0, torch.sigmoid).sigmoid()
    assert (sigmoid > p)[:3].all() and sigmoid[3] < p[3]
    z = torch.tensor([0.6, 0.3, 0.1, -1.0], dtype=torch.float64)  # pushed label at exactly zero
    after = softmax.sparsemax(softmax.step(z, y, -0.1, softmax.sparsemax))
    assert after[0] > 0.6 and after[2] < 0.1 and after[3] == 0


def test_law_gives_the_same_valid_table_twice_and_every_verdict_a_number(tmp_path):
    settings = squeezing.Measurement(seed=100, draws=10)
    table = squeezing.law(tmp_path, settings)
    store.check(table)
    assert table.equals(squeezing.law(tmp_path, settings))
    parts = [{"chapter": e.get("chapter")} | p for e in claims.ledger() for p in e.get("parts", [])]
    parts = [p for p in parts if p["chapter"] == "04_squeezing"]
    assert len(parts) > 20
    assert all(torch.isfinite(torch.tensor(sentences.statistic("04_squeezing", p["statistic"])(table))) for p in parts)


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="laptop"):
        squeezing.settings("lapto", {})


def test_overrides_win_over_the_scale():
    chosen = squeezing.settings("smoke", {"seeds": 3, "draws": None, "vocab": 20})
    assert (chosen.seeds, chosen.draws, chosen.vocab) == (3, 40, 20)
    assert squeezing.grid(chosen) == [squeezing.Measurement(seed, 40) for seed in range(3)]


def test_settings_of_the_small_example_are_those_of_the_parameters_cell():
    cell = notebooks.parameters(notebooks.notebook_path("04_squeezing"))
    assert squeezing.settings("smoke", {p.name: p.default for p in cell.values()}) == squeezing.settings("smoke", {})


def test_table_of_the_regimes_says_who_paid_only_where_somebody_was_pushed_alone():
    table = steps.who_gains(steps.regimes(squeezing.settings("smoke", {})))
    paid = table["y*'s gain paid by labels nobody pushed"]
    assert [bool(text) for text in paid] == [False, True, True, True, False] and paid.iloc[3] == "100%"
    assert list(table["other labels that rise"]) == ["0 of 49", "49 of 49", "1 of 49", "1 of 49", "0 of 48"]


def test_sparsemax_cuts_the_tail_off_and_sigmoids_let_nobody_pay():
    table = steps.who_pays(steps.outputs(50))
    assert table["that fall"].sparsemax > 0 and table["that are exactly 0"].sparsemax > 0
    assert table["that fall"].sigmoid == 0 and table["other labels that rise"].sigmoid == 49


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_playground_computes_what_python_does():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True)
        requests = []
        page.on("request", lambda r: requests.append(r.url))
        page.set_content('<div id="playground"></div>')
        page.add_script_tag(content=(STATIC / "playground.js").read_text())

        def text(name: str) -> str:
            return page.locator(f"#pg-{name}").inner_text()

        for case, exponent, label in (("B", 0.2, 25), ("C", 2.6, 2), ("D", 2.6, 49)):
            page.locator(f"#pg-case-{case}").tap()
            z, y = softmax.zipf(50, exponent), torch.tensor(label)
            before, after = z.softmax(-1), softmax.step(z, y, -3.0).softmax(-1)
            top = softmax.top_other(before, y)
            shown = [float(text(name)) for name in ("py-before", "py-after", "ptop-before", "ptop-after")]
            values = [p[i].item() for i in (y, top) for p in (before, after)]
            assert shown == pytest.approx(values, rel=5e-3)
            assert text("rising") == f"{int((after > before).sum())} of 49"
            assert float(text("entropy-after")) == pytest.approx(torch.special.entr(after).sum().item(), abs=1e-4)
            assert f"{softmax.account(before, after, y).share:.0%} labels" in text("share")
        page.locator("#pg-pushed").focus()
        page.keyboard.press("ArrowLeft")
        assert "49" in text("pushed-value") and page.locator("#pg-log rect").count() == 50
        page.locator("label[for=pg-both]").tap()
        assert float(text("ptop-after")) == pytest.approx(float(text("ptop-before")), abs=2e-3)
        browser.close()
    assert requests == []
