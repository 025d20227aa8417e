# The book's commands. `make run` and `make test` need Python 3.10 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help run test lab refresh site bench clean

help: ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## ?/\1\t/' | expand -t 10

run: .venv/.library ## Set everything up and take the tour: one small model, from text to tour.html
	$(BIN)/ptbook tour

# One thread per process: small models run faster so, and two processes share two cores.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: .venv/.tools ## Set everything up and run every check
	$(BIN)/python -m pytest tests/test_book.py
	PTBOOK_SCALE=tiny PTBOOK_STATIC=1 TQDM_DISABLE=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/test_book.py

lab: .venv/.tools ## Read the book in JupyterLab
	$(BIN)/ptbook lab $(CHAPTER)

refresh: .venv/.tools ## Run a chapter again and keep its outputs and results: make refresh CHAPTER=objectives/causal
	@test -n "$(CHAPTER)" || { echo "which chapter? make refresh CHAPTER=objectives/causal" >&2; exit 2; }
	$(BIN)/nbdev_export
	$(BIN)/ptbook refresh $(CHAPTER)

site: .venv/.tools ## Make the site: _docs/index.html
	$(BIN)/ptbook site

bench: .venv/.library ## Measure the library beside its peers
	$(BIN)/ptbook bench all

clean: ## Remove what the other commands made
	rm -rf .venv build dist *.egg-info _docs _proc work tour.html

# The virtual environment, in two steps: what the library needs, then what its authors need.
# torch goes first, alone, so that a CPU build that lies on the machine is taken before anything asks for another.
.venv/.library: constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed, $(PYTHON) is older: make run PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	@touch $@

.venv/.tools: .venv/.library
	$(PIP) -e '.[dev]'
	@touch $@
