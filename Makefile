# Everything needs only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone, so that the pinned build is taken as it is.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/samaritan simulate configs/demo.yaml --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: lint
	# One thread per operation and one process per core: small tensors gain nothing from more threads.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.sites
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.aggregation
	$(BIN)/python -m benchmarks.codecs
	$(BIN)/python -m benchmarks.communication
	$(BIN)/python -m benchmarks.private_step
	$(BIN)/python -m benchmarks.secure_sum
	$(BIN)/python -m benchmarks.deployment

clean:
	rm -rf $(VENV) build *.egg-info
