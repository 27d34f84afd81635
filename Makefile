# The two commands of the README. Each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,docs
PYTEST_ARGS ?=
# Tests run in this many processes, each with one thread: on two cores twice as fast as one process with two threads.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)

.PHONY: demo test test-slow faults gpu lint docs docs-serve install clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "selfvil needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

install: $(STAMP)

demo: $(STAMP)  ## pack, pretrain, score, export and reload on real images, in minutes
	$(BIN)/python launch/demo.py

test: lint  ## everything but the tests marked slow
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests marked slow: hours
	$(PYTEST) -m slow $(PYTEST_ARGS)

faults: $(STAMP)  ## kill, damage, fill and stall small runs, and print how often what is promised held
	$(BIN)/python tests/faults/campaign.py

# The machine needs no network: it has torch, and the folder of benchmarks/gpu_prepare.py has the rest.
GPU_FOLDER ?= gpu
GPU_ARGS ?=
gpu:  ## on a machine with a GPU: kernel tests, speed, block sizes and recipes, in pieces of at most 9 minutes; again goes on
	@test -d $(GPU_FOLDER) || { echo "there is no folder $(GPU_FOLDER): python benchmarks/gpu_prepare.py makes it"; exit 2; }
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv --system-site-packages .venv-gpu
	test ! -d $(GPU_FOLDER)/wheels || .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps $(GPU_FOLDER)/wheels/*.whl
	PYTHONPATH=ssl .venv-gpu/bin/python benchmarks/gpu.py run --folder $(GPU_FOLDER) $(GPU_ARGS)

docs: $(STAMP)  ## the documentation site, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(STAMP)  ## the site at http://127.0.0.1:8000, built again whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-gpu demo_out site build dist ssl/*.egg-info
