# `make book` and `make test` need Python 3.11 to 3.14 and nothing else; both set themselves up.
PYTHON ?= python3
SCALE  ?= laptop
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env book test browser pdf run bench check format serve status claims clean distclean

help:  ## show this help
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo "  SCALE=smoke|laptop|paper (now: $(SCALE))   PYTHON=$(PYTHON)"

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "lddyn: '$(PYTHON)' not found; install Python 3.11 to 3.14 or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || { echo "lddyn: Python 3.11 to 3.14 is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); say make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[train,notebooks,book,test]'
	@touch $@

env: $(READY)  ## create .venv and install everything

book: $(READY)  ## run every stale notebook at SCALE and build book/_build/html
	$(PY) -m lddyn book --scale $(SCALE)

test: $(READY)  ## run the tests
	$(PY) -m pytest

browser: $(READY)  ## look at the built book in Chromium: maths, figures, links, no outside request
	$(PY) -m pytest tests/test_browser.py -m browser

pdf: $(READY)  ## print the built book to book/_build/companion.pdf (needs Chromium)
	$(PY) -m lddyn pdf

run: $(READY)  ## run one notebook: make run NAME=01_mnist ARGS="-p seeds 2"
	$(PY) -m lddyn run $(NAME) --scale $(SCALE) $(ARGS)

bench: $(READY)  ## measure speed side by side, as ratios in one run
	$(PY) -m lddyn bench

check: $(READY)  ## lint and check the format
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(READY)  ## mend lint and format
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

serve: $(READY)  ## serve the built book on http://127.0.0.1:8000
	$(PY) -m http.server 8000 --bind 127.0.0.1 --directory book/_build/html

status: $(READY)  ## list the runs: fresh, stale, unfinished
	$(PY) -m lddyn status

claims: $(READY)  ## print the verdict on every claim
	$(PY) -m lddyn claims

clean:  ## remove the built book and the executed notebooks (runs/ stays)
	rm -rf book/_build book/generated book/notebooks

distclean: clean  ## remove the runs and the environment too
	rm -rf runs $(VENV)
