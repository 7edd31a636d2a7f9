"""The built book in a real browser: maths, figures and links work, and nothing is loaded from outside."""

import csv
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from urllib.parse import urldefrag, urljoin

import pandas as pd
import pytest
import torch

from lddyn.engine.store import ROOT
from lddyn.publish import figures, notebooks, pdf

pytestmark = pytest.mark.browser
HTML = ROOT / "book" / "_build" / "html"
CHROMIUM = next(filter(None, map(shutil.which, pdf.BROWSERS)), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

if not (HTML / "index.html").exists() or not CHROMIUM:
    pytest.skip("needs `make book` and Chromium", allow_module_level=True)
PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if "_static" not in p.parts)
PAGES = [p for p in PAGES if p not in ("genindex.html", "index.html", "search.html")]  # index.html redirects
# kB of each file of a page, before it is compressed. The limit: what a phone at 10 Mbit/s loads within four seconds
WEIGHTS = """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
    .map(e => [e.name, e.encodedBodySize / 1000])"""
LIMIT = 5000


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "light"), (390, "dark")])
@pytest.mark.parametrize("path", PAGES)
def test_page(site, browser, path, width, theme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    outside, errors, missing = [], [], []
    own = (site, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
    page.on("response", lambda r: missing.append(r.url) if r.status >= 400 else None)
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(site + path)
    page.wait_for_load_state("networkidle")
    if page.locator(".math").count():
        page.wait_for_selector("mjx-container")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert not outside, f"loaded from outside: {outside}"
    weights = dict(page.evaluate(WEIGHTS))
    assert sum(weights.values()) < LIMIT, f"{sum(weights.values()):.0f} kB: {weights}"
    scripts = page.locator("script[src]").evaluate_all("all => all.map(e => e.src)")
    assert len(scripts) == len(set(scripts)), "a script is loaded twice"
    assert not missing, f"not found: {missing}"
    assert not errors, errors
    assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)") == []
    assert page.evaluate("[...document.querySelectorAll('article img')].filter(i => !i.alt).map(i => i.src)") == []
    raw = page.evaluate("[...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length")
    assert raw == 0, "maths was not typeset"
    text = page.locator("article").inner_text()
    # and what a model wrote
    code = " ".join(page.locator("article pre, article code, article .answers").all_inner_texts())
    for mark in (r"\$\$", r"\\\(", r"\{glue", r"```", r":::", r"\{cite"):
        assert not re.search(mark, text) or re.search(mark, code), f"raw markup {mark} on the page"
    parameters = page.locator("details").get_by_text("the one dial")  # their table, and the cell that declares them
    assert not parameters.first.is_visible() and parameters.count() in (0, 2), "parameters are not folded"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways, unfolded"
    wide = "[...document.querySelectorAll('article pre')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{wide}.map(e => e.innerText)") == [], "lines are cut off"
    page.close()


WITH_FIGURES = [path for path in PAGES if "<figure" in (HTML / path).read_text()]


@pytest.mark.parametrize("path", WITH_FIGURES)
def test_under_every_figure_are_its_number_data_command_origin_and_source(site, browser, path):
    page = browser.new_page()
    page.goto(site + path)
    for figure in page.locator("article figure").all():
        name = figure.get_attribute("id")
        assert re.match(r"Figure \d+", figure.locator(".caption-number").text_content()), name
        assert len(figure.locator(".caption-text").text_content()) > 40, name
        link = figure.locator(".under a.download").get_attribute("href")
        data = page.request.get(urljoin(page.url, link)).text()
        assert len(data) < 400_000, f"{name}: {len(data)} letters"
        head, *rows = csv.reader(io.StringIO(data))
        assert tuple(head) == figures.COLUMNS and rows, name
        panels = {}
        for row in rows:  # a series has a name, if its panel has another one
            panels.setdefault((row[0], row[2], row[3]), set()).add(row[1])
        assert all(len(names) == 1 or "" not in names for names in panels.values()), (name, panels)
        made = figure.locator(".under details").text_content()
        assert re.search(r"\bcommits?\b", made) and re.search(r"\d+ seeds|one run each|no run", made), (name, made)
        assert re.search(r"Drawn by lddyn/[\w/]+\.py:\d+ \(\w+\)", made), (name, made)
        assert re.search(r"python -m lddyn run \d\d_\w+ --scale|make book", made), (name, made)
        assert re.search(r"\d", figure.locator("img").get_attribute("alt")), f"{name}: no value in the alternative text"
    page.close()


def test_figures_with_kinds_of_response_lead_to_what_they_are(site, browser):
    page = browser.new_page()
    page.goto(site + "notebooks/05_dpo.html")
    page.locator("#fig-05-kinds .under").get_by_text("Kinds of response").click()
    explained = page.locator("#kinds-by-example")
    assert page.url.endswith("03_sft.html#kinds-by-example") and explained.is_visible()
    assert explained.locator("dt svg").count() == explained.locator("dd").count() == 12
    page.close()


def curves(page, name):
    """The numbers that stand under a figure: panel, series, x, y, low, high."""
    link = page.locator(f"#{name} .under a.download").get_attribute("href")
    return pd.read_csv(io.StringIO(page.request.get(urljoin(page.url, link)).text()))


def test_curves_tell_the_values_under_the_pointer_and_under_the_arrow_keys(site, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(site + "notebooks/05_dpo.html")
    page.wait_for_load_state("networkidle")
    plot = page.locator("#fig-05-kinds .curves-plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 9, box["y"] + 12)  # the end, near the highest curve
    data = curves(page, "fig-05-kinds")
    first = data[data.panel == data.panel.iloc[0]]
    ends, near = first.groupby("series").last(), (first.y.max() - first.y.min()) / 100  # three digits of the range
    best, tip = ends.y.idxmax(), page.locator("#fig-05-kinds .curves-tip").first
    shown = tip.locator("tr.this").inner_text().replace("−", "-").split()
    assert shown[0] == best and float(shown[1]) == pytest.approx(ends.y[best], abs=near)
    assert [float(shown[2]), float(shown[4])] == pytest.approx([ends.low[best], ends.high[best]], abs=near)
    assert re.search(r"epoch .*, step \d+", tip.inner_text()) and re.search(r"range of \d+ seeds", tip.inner_text())
    plot.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    said = plot.get_attribute("aria-valuetext").replace("−", "-")
    name, value = re.match(r"(\w+), epoch .*?: (-?[\d.]+)", said).groups()
    assert name != best and float(value) == pytest.approx(ends.y[name], abs=near)
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.close()


def test_curves_show_one_type_alone_another_model_and_another_unit(site, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(site + "notebooks/05_dpo.html")
    page.wait_for_load_state("networkidle")
    figure = page.locator("#fig-05-kinds")
    legend, faded = figure.locator(".curves-legend"), figure.locator("g.series.faded")
    assert legend.locator("button").count() == 12 and faded.count() == 0
    legend.get_by_text("rejected", exact=True).click()
    assert faded.count() == 11 and legend.locator("[aria-pressed=true]").inner_text() == "rejected"
    legend.get_by_text("rejected", exact=True).click()
    assert faded.count() == 0
    table = figure.locator(".curves details")
    table.locator("summary").click()
    first = table.inner_text()
    figure.get_by_label("per token").check()
    tokens = table.inner_text()
    assert "nats per token" in tokens and tokens != first
    models = figure.locator("select option").all_inner_texts()
    assert models[0] == "small model" and "SmolLM2-135M" in models and any("released log" in name for name in models)
    figure.locator("select").select_option(next(name for name in models if "released log" in name))
    assert figure.get_by_label("per token").is_disabled() and figure.get_by_label("sum").is_checked()
    assert "share of the log" in figure.locator(".curves-plot").first.text_content()
    figure.locator("select").select_option("SmolLM2-135M")
    assert "SmolLM2-135M: change of log π (nats)" in table.inner_text()
    page.close()


def test_curves_answer_a_finger_on_a_phone_without_a_sideways_scroll(site, browser):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(site + "notebooks/03_sft.html")
    page.wait_for_load_state("networkidle")
    plot = page.locator("#fig-03-kinds .curves-plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box["width"] > 280
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#fig-03-kinds .curves-tip").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_the_image_stays_for_paper_and_without_a_script(site, browser):
    page = browser.new_page()
    page.goto(site + "notebooks/05_dpo.html")
    page.wait_for_load_state("networkidle")
    image, shown = page.locator("#fig-05-kinds img"), page.locator("#fig-05-kinds div.curves")
    assert shown.is_visible() and not image.is_visible()
    page.emulate_media(media="print")
    assert image.is_visible() and not shown.is_visible()
    assert (
        not page.locator("figure .under").first.is_visible() and page.locator("#fig-05-kinds figcaption").is_visible()
    )
    page.close()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site + "notebooks/05_dpo.html")
    assert page.locator("#fig-05-kinds img").is_visible()
    context.close()


def test_curves_are_small_and_in_every_chapter_that_trains(site, browser):
    script = HTML / "_static" / "curves.js"
    assert script.stat().st_size + script.with_suffix(".css").stat().st_size <= 40_000
    page, found = browser.new_page(), {}
    for chapter in ("03_sft", "05_dpo", "06_variants", "07_extend"):
        page.goto(f"{site}notebooks/{chapter}.html")
        found[chapter] = page.locator("div.curves").count()
    assert all(found.values()), found
    page.close()


def dpo_with_torch(overlap, chosen, rejected, raised, steps):
    """Changes of log pi (contexts, tokens) as chapter 5 computes them; `raised`: SFT on the chosen token before."""
    contexts = torch.tensor([[1.0, overlap], [overlap, 1.0]], dtype=torch.float64)
    logits = torch.tensor([4.0, 2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64).repeat(2, 1)
    logits[0, chosen] += raised
    start, w = logits.log_softmax(-1), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        logp = (contexts @ w + start).log_softmax(-1)
        margin = logp[0, chosen] - start[0, chosen] - (logp[1, rejected] - start[1, rejected])
        (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin), w)
        w = (w - 0.1 * gradient).detach().requires_grad_()
    return ((contexts @ w + start).log_softmax(-1) - start).detach()


@pytest.fixture(scope="module")
def playground(site, browser):
    page = browser.new_page()
    page.goto(site + "notebooks/04_squeezing.html")
    yield page
    page.close()


@pytest.mark.parametrize("raised", [0.0, 5.0])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.9])
def test_the_playground_computes_dpo_as_torch_does(playground, overlap, raised):
    state = {"overlap": overlap, "chosen": 3, "rejected": 5, "raised": raised, "steps": 300}
    path = torch.tensor(playground.evaluate("state => playground.dpo(state)", state), dtype=torch.float64)
    expected = dpo_with_torch(**state)
    assert path.shape == (301, 2, 6) and (path[-1] - path[0] - expected).abs().max() < 1e-9
    assert (expected[0, 3] < 0) == (overlap == 0.9 and raised == 5)  # where DPO lowers the chosen token as well


def test_the_playground_starts_from_the_ten_lines_of_chapter_5(playground):
    cells = json.loads(notebooks.notebook_path("05_dpo").read_text())["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "logsigmoid(margin)" in "".join(c["source"]))
    names = {"torch": torch, "pd": pd}
    exec(source, names)  # its logp are those before the last of its 300 steps
    state = {"overlap": 0.2, "chosen": names["chosen"], "rejected": names["rejected"], "raised": 0, "steps": 299}
    path = torch.tensor(playground.evaluate("state => playground.dpo(state)", state), dtype=torch.float64)
    assert (path[-1] - names["logp"]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("scene", "moved"),
    [
        ("one", {"peakiness": "1.4", "pulled": "7", "strength": "30"}),
        ("two", {"overlap": "0.85", "raised": "5", "steps": "640"}),
    ],
)
def test_a_link_carries_the_state_of_the_playground(site, browser, scene, moved):
    page = browser.new_page()
    page.goto(site + "notebooks/04_squeezing.html")
    page.check(f"#pg-{scene}")
    page.evaluate(
        """moved => Object.entries(moved).forEach(([name, value]) => {
            const input = document.getElementById(`pg-${name}`);
            input.value = name === "strength" ? 13 : value;
            input.dispatchEvent(new Event("input", { bubbles: true }));
        })""",
        moved,
    )
    link, told = page.url, page.locator(f"#pg-scene-{scene} table").inner_text()
    assert page.locator("#pg-link").get_attribute("href") == link[link.index("#") :]
    assert all(f"{name}={value}" in link for name, value in moved.items()), link
    page.close()
    page = browser.new_page()
    page.goto(link)
    assert page.locator(f"#pg-scene-{scene} table").inner_text() == told
    page.goto(
        site + "notebooks/04_squeezing.html#playground=two&overlap=7&steps=x&nothing=1"
    )  # of no use, and harmless
    page.reload()
    assert page.locator("#pg-overlap").input_value() == "1" and page.locator("#pg-steps").input_value() == "300"
    page.close()


def test_two_alike_contexts_show_dpo_lowering_the_chosen_token(site, browser):
    page = browser.new_page()
    page.goto(site + "notebooks/04_squeezing.html")
    page.check("#pg-two")
    page.click("#pg-case-far-unlikely")
    assert "the chosen token has gained" in page.locator("#pg-said").inner_text()
    page.click("#pg-case-near-likely")
    assert "the chosen token has lost" in page.locator("#pg-said").inner_text()
    page.close()


@pytest.mark.parametrize("chapter", ["04_squeezing", "05_dpo"])
def test_a_sentence_leads_to_where_dpo_lowers_the_chosen_token(site, browser, chapter):
    page = browser.new_page()
    page.goto(f"{site}notebooks/{chapter}.html")
    page.locator("article a[href*='#playground=two']").and_(page.get_by_text("DPO lower")).click()
    page.wait_for_url("**/04_squeezing.html#playground=two*")
    assert page.locator("#pg-two").is_checked() and page.locator("#pg-raised").input_value() == "5"
    assert "the chosen token has lost" in page.locator("#pg-said").inner_text()
    page.close()


NOT_OURS = [[".citation-list"], ["mjx-container"]]  # docutils' list of references, MathJax's formulas
AT_REST = "* { animation: none !important; transition: none !important; }"
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
RULES |= {"rules": {"heading-order": {"enabled": True}}}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_accessible(site, browser, path, theme):
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    page.goto(site + path)
    page.wait_for_load_state("networkidle")
    page.add_style_tag(content=AT_REST)
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    if path.endswith("04_squeezing.html"):
        page.check("#pg-two")
    found = Axe().run(page, {"exclude": NOT_OURS}, RULES).response["violations"]
    told = [(rule["id"], node["html"][:120], node["failureSummary"]) for rule in found for node in rule["nodes"]]
    assert not told
    page.close()


def test_no_link_inside_the_book_is_broken(site, browser):
    page = browser.new_page()
    ids, links = {}, {}
    for path in PAGES:
        page.goto(site + path)
        ids[site + path] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        links[site + path] = page.evaluate(
            "[...document.querySelectorAll('article a[href], nav a[href]')].map(a => a.getAttribute('href'))"
        )
    for source, targets in links.items():
        for href in targets:
            target, fragment = urldefrag(urljoin(source, href))
            if target in ids and fragment:  # that of the playground has its state after it
                assert fragment.partition("=")[0] in ids[target], f"{source}: no anchor {href}"
            elif target.startswith(site) and target not in ids:
                assert page.request.get(target).ok, f"{source}: broken link {href}"
    page.close()


def test_the_scorecard_filters_and_sorts(site, browser):
    page = browser.new_page()
    page.goto(site + "generated/scorecard.html")
    rows = page.locator("#claims-table tbody tr:visible")
    assert rows.count() == 49
    page.select_option("#sc-chapter", "05_dpo")
    page.fill("#sc-words", "margin")
    assert 0 < rows.count() < 13 and f"{rows.count()} of 49" in page.inner_text("#sc-count")
    page.fill("#sc-words", "")
    page.click("#claims-table th:first-child button")  # sorted upwards already: turns round
    numbers = [int(n) for n in page.locator("#claims-table tbody tr:visible td:first-child").all_inner_texts()]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) > 5
    page.close()


def test_the_book_prints_to_one_pdf(tmp_path):
    out = tmp_path / "companion.pdf"
    subprocess.run([sys.executable, "-m", "lddyn", "pdf", "--out", str(out)], check=True, cwd=ROOT)
    assert out.read_bytes()[:5] == b"%PDF-" and out.stat().st_size > 500_000
