# Two commands do all the set-up on a fresh machine: `make tour` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHROMIUM := $(VENV)/.chromium
PEERS := .venv-peers

.PHONY: help setup tour lab test test-all test-compat peers check fix bench docs readme clean

help:            ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(READY) $(CHROMIUM)   ## make the environment in .venv

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Chromium draws PDF, SVG and PNG and runs the browser tests; without it HTML and CSV remain.
$(CHROMIUM): | $(READY)
	@sh docs/chromium.sh || echo "Chromium could not be installed: figures stay HTML and CSV, browser tests are skipped."
	@touch $@

tour: setup      ## run the main job on the bundled model, from text to features
	$(BIN)/sae-lab tour

lab: setup       ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs $(if $(filter 0,$(shell id -u)),--allow-root)

test: setup      ## pass all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not compat and not peers"

test-all: setup  ## the long proofs too
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not compat and not peers"

test-compat: setup  ## the oldest supported transformer-lens, in an environment of its own
	test -x .venv-tl39/bin/python || $(PYTHON) -m venv .venv-tl39
	.venv-tl39/bin/python -m pip install --quiet "torch==2.13.0" "transformer-lens==3.9.*" pytest hypothesis beartype --editable .
	.venv-tl39/bin/python -m pytest -m compat tests/compat

peers: $(PEERS)/.ready  ## SAELens, dictionary_learning and sparsify in an environment of their own: files both ways
	$(PEERS)/bin/python -m pytest -m peers tests/peers

$(PEERS)/.ready: constraints-peers.txt settings.ini setup.py pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints-peers.txt "torch==2.13.0"
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement constraints-peers.txt --editable .
	@touch $@

check: $(READY)  ## format, lint, types, export in sync, budgets (under a minute)
	$(BIN)/ruff check nbs tests sae_lab docs setup.py
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_repo.py

bench: setup     ## measure speed on this machine
	for name in import harvest train index features ui causal; do $(BIN)/sae-lab bench $$name || exit 1; done

docs: setup      ## build the site in _docs
	$(BIN)/python docs/build.py

readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

clean:           ## remove what was built
	rm -rf _docs _proc build dist runs *.egg-info
