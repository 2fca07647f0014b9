# Everything runs in .venv, made and refreshed as needed from python3, a C++ compiler and the package
# index. PYTHON chooses another interpreter (3.11 or newer): make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/types
PEERS := $(VENV)/.peers
NEWEST := .newest
# What compiles and inspects CUDA kernels: headers and two programs, without what their packages ask
# for, which only CUTLASS's Python half needs.
CUDA_TOOLS := nvidia-cutlass nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
BENCHMARKS := attention producers cpu_unet scaling compile_cost reconstruct ablation load

# Idle OpenMP threads sleep instead of spinning: a busy neighbour then costs a share, not 100x.
export OMP_WAIT_POLICY := passive
# Two processes; a file's tests stay in one of them, which share the models that they make.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install docs demo test test-all test-slow test-newest fuzz lint format types bench clean

help:
	@echo "make demo      quantise the bundled model and show what came of it"
	@echo "make test      the tests, without the slow ones"
	@echo "make test-all  lint and all tests"
	@echo "make test-slow the slow tests, and the others on the newest torch that the index has"
	@echo "make fuzz      random modules for SECONDS=600, compiled to the right result or refused by name"
	@echo "make lint      ruff and mypy (make format repairs what ruff can)"
	@echo "make docs      the API reference, from docstrings, to build/docs"
	@echo "make bench     the measured comparisons, most of a day; other systems are installed for it"
	@echo "make clean     remove everything make built"

install: $(STAMP)

# torch first and pinned: any looser range would take the newest build there is.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	if command -v nvcc > /dev/null; then \
		$(BIN)/pip install -q -c constraints.txt --no-deps $(CUDA_TOOLS); fi
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(PYTEST) -m "not slow" --durations=10

test-slow: $(STAMP) test-newest
	$(PYTEST) -m slow --durations=10

# What pip takes for 'fxquant[eval]' where nothing is constrained, made anew every time.
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q --upgrade -e '.[eval,dev]'
	$(NEWEST)/bin/pip list | grep -E '^(torch|torchvision|diffusers|transformers|numpy) '
	$(NEWEST)/bin/pytest -q -n 2 --dist loadfile -m "not slow" --durations=10

# From a seed that it prints; SEED=123 repeats one. FUZZ=--keep-going counts causes, instead of
# stopping at the first.
SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.campaign --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(FUZZ)

test-all: lint $(STAMP)
	$(PYTEST) --durations=20

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot follow the editable install, so it reads a tree of links laid out as installed.
types: $(STAMP)
	rm -rf $(TYPES) && mkdir -p $(TYPES)/fxquant
	ln -s $(CURDIR)/fxquant/* $(CURDIR)/passes $(CURDIR)/kernels $(TYPES)/fxquant/
	cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p fxquant

docs: $(STAMP)
	$(BIN)/pdoc --docformat google -o build/docs fxquant fxquant.recipe fxquant.errors \
		fxquant.calibration fxquant.graph fxquant.quant fxquant.runtime fxquant.evaluate \
		fxquant.passes fxquant.kernels

# What fxquant is compared with: large, and needed by nothing else.
$(PEERS): $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,bench]'
	@touch $@

bench: $(PEERS)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done

clean:
	rm -rf $(VENV) $(NEWEST) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
