"""Generated pages: a template that nobody fills, or a name in it without a value, must not reach a reader."""

import pytest

from lddyn.chapters import claims
from lddyn.engine.store import Run
from lddyn.publish import pages


@pytest.fixture
def generated(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "GENERATED", tmp_path / "generated")
    return tmp_path / "generated"


def test_every_template_becomes_a_page_without_gaps(generated):
    run = Run(None, None, {"parameters": {"seed": 0}, "seconds": 90})
    pages.write_chapters({name: {"scale": "smoke", "runs": [run]} for name in pages.chapters()})
    pages.write_scorecard(claims.verdicts({}))
    pages.write_status()
    pages.write_data_card()
    pages.write_bench()
    pages.write_sweeps()
    templates = sorted(path.name for path in (pages.BOOK / "templates").iterdir())
    assert templates == sorted(path.name for path in generated.iterdir())
    assert not [name for name in templates if "$" in (generated / name).read_text()]
    assert "| {doc}`/notebooks/01_mnist` | smoke | 1 | 1 | 1.5 |" in (generated / "chapters.md").read_text()


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(KeyError, match="scales"):
        pages.filled("scorecard.md", count=1, counts="", summary="", table="")


def test_text_of_a_claim_is_no_html_in_the_table_of_verdicts():
    (entry, *_) = claims.verdicts({})
    html = claims.as_html([entry | {"claim": "<b>a & b</b>", "paper": "<", "reason": "<i>"}], here="this training")
    assert "&lt;b&gt;a &amp; b" in html and "<i>" not in html and "<th>this training</th>" in html
