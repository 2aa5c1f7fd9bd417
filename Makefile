# Two commands on a machine with Python >= 3.11, make and pip:
#
#   make demo      train, compare and save the demo's models
#   make test      lint, types and the whole test suite
#
# Each makes .venv and installs what it needs at the versions of constraints.txt; a second run installs nothing.
#
# Variables (set one after the command, `make test PIP_ARGS=...`):
#   PIP_ARGS       handed to pip: the place for the index of another PyTorch build (CUDA, ROCm or CPU)
#   PYTHON         the interpreter that makes .venv (python3)
#   CONSTRAINTS    versions to install (constraints.txt); /dev/null takes the newest that pyproject.toml admits
#   PYTEST_ARGS    handed to pytest's main run, e.g. '-n 8' or '-m "not slow"' (-n 2)
#   ARGS           handed to `hf-hardattn demo` and `hf-hardattn bench`

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?= -n 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.ready-demo
TEST_READY := $(VENV)/.ready-test
DOCS_READY := $(VENV)/.ready-docs
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)

# A second processor, as far as one machine can be two: without the wide vectors of PyTorch, MKL and oneDNN, sums round differently. There
# the laws that compare outputs run again (1 to 5 and 7 of CONTRIBUTING.md; about a minute).
OLD_CPU := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41
LAWS_AGAIN := $(patsubst %,tests/laws/test_%.py,budget_one executions certificate padding generate remove)

NO_BROWSER = echo "no chromium and chromedriver: the browser tests will fail. Install them (Debian: sudo apt-get install chromium chromium-driver), or leave those tests out: make test PYTEST_ARGS='-n 2 -m \"not browser\"'"

.DEFAULT_GOAL := help
.PHONY: help demo test lint browser bench docs release-check clean distclean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(DEMO_READY)  ## Run the demo: three small ViTs, one table, one picture
	$(BIN)/hf-hardattn demo $(ARGS)

test: lint browser  ## Run ruff, mypy and the tests, some of them on two kinds of processor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(OLD_CPU) $(BIN)/python -m pytest -n 2 $(LAWS_AGAIN)

lint: $(TEST_READY)  ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Some tests drive a real browser. Debian's is installed where that is possible; elsewhere those tests fail and say why.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing chromium and chromium-driver for the browser tests"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null || $(NO_BROWSER); \
	else $(NO_BROWSER); fi

docs: $(DOCS_READY)  ## Build the documentation into site/; a broken link is an error
	$(BIN)/python scripts/docs/render.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

release-check: $(TEST_READY)  ## Build wheel and sdist, install each into an empty environment, run the quickstart there
	$(BIN)/python scripts/docs/release_check.py --constraints $(CONSTRAINTS) $(PIP_ARGS)

bench: $(DEMO_READY)  ## Measure speed and memory on this machine
	$(BIN)/hf-hardattn bench $(ARGS)

clean:  ## Remove caches and builds; keep .venv and outputs/
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too, to install another PyTorch build
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "hf-hardattn needs Python >= 3.11; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The order-only prerequisite: a venv that exists is never remade because its interpreter looks old.
$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the demo's packages into $(VENV) (minutes the first time)"
	$(PIP_INSTALL) -e '.[demo,vision,energy]'
	@touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the tests' packages into $(VENV) (minutes the first time)"
	$(PIP_INSTALL) -e '.[all,dev]'
	@touch $@ $(DEMO_READY)

$(DOCS_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the documentation's packages into $(VENV) (minutes the first time)"
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
