"""Generated pages: a template that nobody fills, or a name in it without a value, must not reach a reader."""

import pandas as pd
import pytest

from lddyn.chapters import claims
from lddyn.engine.store import Run
from lddyn.publish import across, pages


@pytest.fixture
def generated(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "GENERATED", tmp_path / "generated")
    return tmp_path / "generated"


def test_every_template_becomes_a_page_without_gaps(generated, tmp_path, monkeypatch):
    pages.write_paper_scale({})
    made = {
        "git": {"commit": "1234567", "dirty": False},
        "versions": {},
        "machine": "m",
        "finished": "2026-11-26T18:20",
    }
    run = Run(tmp_path, pd.DataFrame(), {"parameters": {"seed": 0}, "seconds": 90} | made)
    shown = {name: {"scale": "smoke", "runs": [run]} for name in pages.chapters()}
    ends = pd.DataFrame({"name": ["DPO", "IPO"], "seed": 0, "chosen": [-1.0, 0.5], "margin": 2.0, "won": 0.5})
    monkeypatch.setattr(pages.store, "frame", lambda runs: pd.DataFrame())
    monkeypatch.setattr(across, "carried_over", lambda *_: pd.DataFrame({"digits": [2.0], "language model": [2.0]}))
    monkeypatch.setattr(across, "ways_to_soften", lambda *_: ends)
    pages.write_chapters(shown)
    pages.write_citation()
    pages.write_across(shown)
    pages.write_scorecard(claims.verdicts({}))
    assert not pages.write_found(claims.verdicts({}))
    pages.write_status()
    pages.write_data_card()
    pages.write_model_card()
    pages.write_bench()
    pages.write_sweeps()
    pages.write_preflight()
    templates = sorted(path.name for path in (pages.BOOK / "templates").iterdir())
    assert templates == sorted(path.name for path in generated.glob("*.md"))
    assert (generated / "softening.svg").exists()
    assert '"runs of 06_variants, scale smoke": "1 seeds (0)' in (generated / "figures" / "softening.json").read_text()
    assert not [name for name in templates if "$" in (generated / name).read_text()]
    assert "| {doc}`/notebooks/01_mnist` | smoke | 1 | 1 | 1.5 |" in (generated / "chapters.md").read_text()


def test_a_claim_that_released_logs_can_tell_shows_their_verdict_and_no_typed_text():
    entries = claims.verdicts({})
    html = claims.as_html(entries)
    assert all(entry["released"] or entry["id"] not in range(20, 25) for entry in entries)
    assert not [entry["id"] for entry in entries if entry["released"] and entry["authors"]]
    assert "rule &gt; 0.9: holds in 7 of 7 runs (4 of 4 models)" in html and "(1 of 3 parts measured)" in html
    assert "not faster" in html  # claim 35: typed, as no log can tell


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(KeyError, match="scales"):
        pages.filled("scorecard.md", count=1, counts="", summary="", table="")


def test_text_of_a_claim_is_no_html_in_the_table_of_verdicts():
    (entry, *_) = claims.verdicts({})
    html = claims.as_html([entry | {"claim": "<b>a & b</b>", "paper": "<", "reason": "<i>"}], here="this training")
    assert "&lt;b&gt;a &amp; b" in html and "<i>" not in html and "<th>this training</th>" in html
