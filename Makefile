# `make` lists the targets. PYTHON makes the virtual environment, JOBS is how many tests run at once:
# for example `make test PYTHON=python3.13 JOBS=4`. GNU make 3.81 or later.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NEEDS := pyproject.toml setup.py constraints.txt $(wildcard backends/torch/cpu/*.cpp backends/torch/cpu/*.h)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: help venv demo test check lint test-slow stress fuzz quality compile sanitize format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/dev.stamp ## install llmrs and what its tests need into .venv

demo: $(VENV)/run.stamp ## answer the bundled example with the bundled model
	$(BIN)/llmrs run examples/demo.yaml

test: lint ## everything that a change must pass
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow"

check: lint ## the quick part of `make test`: style, types, layout
	$(PYTEST) tests/test_layout.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p llmrs

test-slow: $(VENV)/dev.stamp ## the longer tests
	$(PYTEST) -n $(JOBS) -m slow

stress: $(VENV)/dev.stamp ## two million steps of the core under random load
	LLMRS_STRESS=100 $(PYTEST) tests/core/test_stress.py

fuzz: $(VENV)/dev.stamp ## a million mutated GGUF files
	LLMRS_FUZZ=1000000 $(PYTEST) -s tests/models/test_gguf_fuzz.py

quality: $(VENV)/dev.stamp ## measure what each quantization costs, and update the table in the docs
	PYTHONPATH=examples $(BIN)/python tests/tools/quant_quality.py 60 docs/quantization.md

compile: $(VENV)/dev.stamp ## compile every Triton kernel for five kinds of GPU, without one
	$(BIN)/python tests/tools/triton_compile.py all sm_80 sm_89 sm_90 sm_100 sm_120

sanitize: $(VENV)/dev.stamp ## on an NVIDIA GPU: the kernel tests under compute-sanitizer
	for tool in memcheck racecheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/tools/sanitize.py || exit 1; done

format: $(VENV)/dev.stamp ## put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(VENV)/dev.stamp ## build the source archive and the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# What is installed is marked by two empty files; the tests' set-up holds all that the demo needs.
$(VENV)/dev.stamp: $(NEEDS) | $(BIN)/python
	@echo "installing llmrs and what its tests need into $(VENV)"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $(VENV)/run.stamp $@

$(VENV)/run.stamp: $(NEEDS) | $(BIN)/python
	@echo "installing llmrs into $(VENV)"
	@$(PIP) install -q -c constraints.txt -e '.[torch]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("llmrs needs Python 3.11 or later: make PYTHON=python3.13 ...")'
	$(PYTHON) -m venv $(VENV)
