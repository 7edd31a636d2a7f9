"""What a chapter shows besides figures."""

from types import SimpleNamespace

import pandas as pd

from lddyn.chapters import claims, style
from lddyn.data.responses import MEANINGS, RESPONSE_TYPES
from lddyn.publish import display


def test_what_a_model_wrote_is_escaped_and_keeps_its_line_breaks():
    html = display.answers(pd.DataFrame({"before": ["<b>so</b>\n```python"]}, index=["Why & how?"]))
    assert "&lt;b&gt;so&lt;/b&gt;\n```python" in html and "<th>Why &amp; how?</th>" in html


def test_reasons_written_for_the_small_model_do_not_stand_under_the_real_one():
    html = display.real_model("03_sft", SimpleNamespace(verdicts=list))
    assert claims.ledger()[22]["why"] and 'class="why"' not in html
    assert "SmolLM2-135M" in html and "scale pretrained" in html


def test_every_kind_of_response_is_explained_with_its_own_line_and_mark():
    assert list(MEANINGS) == list(RESPONSE_TYPES) and set(style.STYLES) == set(RESPONSE_TYPES)
    html = display.kinds({kind: f" text of <{kind}>" for kind in RESPONSE_TYPES}, dict.fromkeys(RESPONSE_TYPES, -1.234))
    for kind, meaning in MEANINGS.items():
        assert f"> {kind}<small>-1.23 nats a token" in html and meaning in html and f"text of &lt;{kind}&gt;" in html
    assert len({display.swatch(kind) for kind in RESPONSE_TYPES}) == len(RESPONSE_TYPES)
    assert "other_test" not in display.kinds({"chosen": " a"}, {"chosen": 0.0})
