"""What a chapter shows besides figures."""

from types import SimpleNamespace

import pandas as pd

from lddyn.chapters import claims
from lddyn.publish import display


def test_what_a_model_wrote_is_escaped_and_keeps_its_line_breaks():
    html = display.answers(pd.DataFrame({"before": ["<b>so</b>\n```python"]}, index=["Why & how?"]))
    assert "&lt;b&gt;so&lt;/b&gt;\n```python" in html and "<th>Why &amp; how?</th>" in html


def test_reasons_written_for_the_small_model_do_not_stand_under_the_real_one():
    html = display.real_model("03_sft", SimpleNamespace(verdicts=list))
    assert claims.ledger()[22]["why"] and 'class="why"' not in html
    assert "SmolLM2-135M" in html and "scale pretrained" in html
