"""The built book as one PDF, printed by a browser, maths and figures included."""

import shutil
import tempfile
from pathlib import Path

from lddyn import InputError
from lddyn.engine import store
from lddyn.publish import build, pages

PAPER = {
    "format": "A4",
    "margin": {"top": "18mm", "bottom": "18mm", "left": "15mm", "right": "15mm"},
    "print_background": True,
    "display_header_footer": True,
    "header_template": "<span></span>",
    "footer_template": '<div style="font-size: 8px; margin: auto"><span class="pageNumber"></span></div>',
    "outline": True,
    "tagged": True,
}
ON_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", ON_MACOS)


def write(out: Path) -> Path:
    """Print the pages as they are now to `out`; returns it.

    Raises `InputError` when the book was never built, or where no Chromium is installed.
    """
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not chromium:
        raise InputError(f"a PDF is printed by a browser, and none is installed (any of {', '.join(BROWSERS)})")
    if not (pages.GENERATED / "scorecard.md").exists():
        raise InputError("there is no book to print: run `make book` first")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        done = build.jupyter_book("--builder", "singlehtml", "--path-output", folder)
        page = Path(folder) / "_build" / "singlehtml" / "intro.html"
        if done.returncode or not page.exists():
            raise store.RecordError(f"the book did not build as one page: {done.stderr.strip().splitlines()[-1:]}")
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_load_state("networkidle")
            tab.wait_for_function(
                "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))", timeout=120_000
            )
            # the answers to the exercises are open on paper; code that is folded stays so
            tab.evaluate("document.querySelectorAll('details:not(.hide)').forEach(e => { e.open = true; })")
            store.write_atomically(out, lambda path: path.write_bytes(tab.pdf(**PAPER)))
            browser.close()
    return out
