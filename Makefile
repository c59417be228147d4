# Everything that a fresh machine needs: `make demo` and `make test`, in either order.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FRESH := build/fresh
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test clients lint format docs package table coverage benchmark rule clean

demo: $(VENV)/.runtime
	$(BIN)/python -m funcjac

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# funcjac inside libraries that others wrote, and the page in the docs about them.
clients: $(VENV)/.clients
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/clients \
		'tests/test_demo.py::test_blocks_run_in_order[clients]'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/. A warning or a dead link fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and sdist, in dist/; the tests of the one run on the other, in a fresh environment.
package: $(VENV)/.package
	rm -rf dist $(FRESH)
	$(BIN)/python -m build --outdir dist > /dev/null
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	    --constraint constraints.txt "$$(echo dist/*.whl)[test]"
	tar --extract --file dist/*.tar.gz --directory $(FRESH) --strip-components 1 \
	    --exclude '*/funcjac'
	cd $(FRESH) && bin/python -m pytest -m quick tests

# The page in the docs that shows each function in each engine and mode.
table: $(VENV)/.test
	$(BIN)/python -m tests.sweeps.functions

# Every operator and module of PyTorch, in every transform; goes on where it was left.
coverage: $(VENV)/.test
	$(BIN)/python -m tests.sweeps.coverage

# Speed beside the best way by hand, and whether results are the same under load.
benchmark: $(VENV)/.test
	$(BIN)/python benchmarks/jacobians.py
	$(BIN)/python benchmarks/training_steps.py
	$(BIN)/python benchmarks/first_call.py --reproducible

# The rule that chooses mode and chunk size, beside every fixed choice.
rule: $(VENV)/.test
	$(BIN)/python benchmarks/rule.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.runtime

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.test $(VENV)/.runtime

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[docs]'
	touch $@ $(VENV)/.runtime

$(VENV)/.package: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[package]'
	touch $@ $(VENV)/.runtime

# laplace-torch asks for torchvision and does not use it; it does not load beside a torch for CPUs
# if its wheel is for CUDA, and whoever looks for it then fails.
$(VENV)/.clients: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[clients]'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@ $(VENV)/.test $(VENV)/.runtime

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist site
