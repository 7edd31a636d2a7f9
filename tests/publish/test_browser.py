"""The built book in a real browser: maths, figures and links work, and nothing is loaded from outside."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from urllib.parse import urldefrag, urljoin

import pytest

from lddyn.engine.store import ROOT
from lddyn.publish import pdf

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
# the theme's own noise: its launch script declares a constant twice
HARMLESS = re.compile(r"THEBE_JS_URL|Got invalid theme mode")

if not (HTML / "index.html").exists() or not CHROMIUM:
    pytest.skip("needs `make book` and Chromium", allow_module_level=True)
PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if "_static" not in p.parts)
PAGES = [p for p in PAGES if p not in ("genindex.html", "index.html", "search.html")]  # index.html redirects


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


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", PAGES)
def test_page(site, browser, path, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    outside, errors, missing = [], [], []
    own = (site, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
    page.on("response", lambda r: missing.append(r.url) if r.status >= 400 else None)
    page.on(
        "console",
        lambda m: errors.append(m.text) if m.type == "error" and not HARMLESS.search(m.text) else None,
    )
    page.on("pageerror", lambda e: None if HARMLESS.search(str(e)) else errors.append(str(e)))
    page.goto(site + path)
    page.wait_for_load_state("networkidle")
    if page.locator(".math").count():
        page.wait_for_selector("mjx-container")
    assert not outside, f"loaded from outside: {outside}"
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
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    wide = "[...document.querySelectorAll('article pre')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{wide}.map(e => e.innerText)") == [], "lines are cut off"
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
            if target in ids and fragment:
                assert fragment in ids[target], f"{source}: no anchor {href}"
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
