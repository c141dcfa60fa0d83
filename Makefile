# quickstart and test make their own virtual environment; nothing else needs to be installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test check bench fmt clean

quickstart: $(INSTALLED)  ## corpus to trained, evaluated, exported model on this CPU, in minutes
	$(BIN)/python -m launch.quickstart

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

check: $(INSTALLED)  ## lint, types, layering, fast tests: before each commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not slow"

bench: $(INSTALLED)  ## speed and memory beside the peers, on an idle machine; fails if a goal is missed
	$(BIN)/python -m benchmarks.all --check --json runs/bench

fmt: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp is made after a complete install, so that an interrupted one is taken up again. mamba-ssm and causal-conv1d
# come without their CUDA extensions: tests put stand-ins in their place, so that a machine without a GPU runs the
# packages' Python. Both variables of a package are needed. pip would keep these wheels and later give them to a machine
# with a GPU, hence no cache; and would install a second torch to build them, hence no isolation.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation --no-deps --no-cache-dir mamba-ssm causal-conv1d
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
