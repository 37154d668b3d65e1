# `make` lists the targets. They need make, g++ and one Python from 3.11 to 3.13; everything else goes into .venv.
#   make test PYTHON=/path/to/python3.12         build .venv from this Python (after make clean)
#   make test PYTHON=/path/to/python VENV=none   use this Python as it is: no .venv, nothing installed, no network

PYTHON  ?=
VENV    ?= .venv
WORKERS ?= 2
TESTS   ?= tests

# Without bytecode: to compile every module takes longer than to install them, and most are never imported.
PIP_INSTALL = $(VENV)/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt

ifeq ($(VENV),none)
PY     := $(or $(PYTHON),python3)
READY  := given-python
# One process, because tests on a GPU share it; the wheel check is left out, because it installs from the network.
PYTEST := $(PY) -m pytest --ignore=tests/test_wheel.py
else
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
# A file stays on one worker, so that what its fixtures compile is compiled once.
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout 900 --durations 8
endif

# $(call check,MODULE,COMMAND): with VENV=none a missing tool is named and passed over, because nothing may be installed.
check = $(if $(filter none,$(VENV)),if $(PY) -c 'import $(1)' 2>/dev/null; then $(2); else echo "skipped: $(PY) has no $(1)"; fi,$(2))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow sanitize bench lint format types imports tritonserver clean toolchain given-python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train a recommender on MovieLens-100K, compile it, recommend ten films to one user
	$(PY) examples/movielens/demo.py

test: $(READY) lint types imports tritonserver ## all that CI runs: lint, types, imports, tests, wheel
	$(PYTEST) $(TESTS)

test-slow: $(READY) ## the tests marked slow
	$(PYTEST) -m slow $(TESTS)

SANITIZER = compute-sanitizer --error-exitcode 9 --target-processes all $(PY) -m pytest -o addopts= -q -n auto -p no:cacheprovider
sanitize: $(READY) ## the GPU kernels' tests under compute-sanitizer: no access outside of any tensor
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) tests/kernels/test_triton.py tests/kernels/test_triton_octets.py \
	  tests/kernels/test_triton_products.py
	@echo "whole layers are captured in graphs, which takes memory that torch keeps"
	$(SANITIZER) tests/lowering/test_encoders.py tests/lowering/test_towers.py

bench: $(READY) ## measure the zoo against its peers
	$(PY) -m benchmarks.cpu

lint: $(READY) ## ruff: rules and format
	@$(call check,ruff,$(PY) -m ruff check . && $(PY) -m ruff format --check .)

format: $(READY) ## let ruff mend and format the code
	@$(call check,ruff,$(PY) -m ruff check --fix . && $(PY) -m ruff format .)

types: $(READY) ## mypy over grc/
	@$(call check,mypy,$(PY) -m mypy)

imports: $(READY) ## import-linter: which folder may import which
	@$(call check,importlinter,$(PY) -c 'from importlinter.cli import lint_imports_command as run; run(["--no-logo"])')

tritonserver: $(READY) ## a real tritonserver for the tests, unpacked into ~/.cache/grc (55 MB, once)
	@$(if $(filter none,$(VENV)),echo "VENV=none: tritonserver is not fetched",$(PY) -m grc.runtime.triton_repository.wheel)

clean: ## remove .venv, build outputs and caches
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A shim may exist and not run (pyenv), so a candidate counts only when it has answered.
$(VENV)/.installed: pyproject.toml constraints.txt | toolchain
	@python=; found=; \
	for candidate in $(or $(PYTHON),python3.12 python3.11 python3.13 python3); do \
	  $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue; \
	  found=$${found:-$$candidate}; \
	  if $$candidate -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: none of these is a Python from 3.11 to 3.13 that runs: $(or $(PYTHON),python3.12 python3.11 python3.13 python3)" >&2; \
	  echo "hint: sudo apt-get install python3 python3-venv    or name one: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if [ -z "$$python" ]; then \
	  version=$$($$found -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	  echo "error: $$found can't make a virtual environment: it lacks venv or ensurepip" >&2; \
	  echo "hint: sudo apt-get install $$version-venv" >&2; \
	  exit 1; \
	fi; \
	if $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  echo "[1/4] $(VENV) is there: $$($(VENV)/bin/python --version)"; \
	else \
	  echo "[1/4] $(VENV) from $$($$python --version) ($$python)"; \
	  $$python -m venv --clear $(VENV); \
	fi
	@echo "[2/4] torch"
	@$(PIP_INSTALL) torch
	@echo "[3/4] grc, its extras and its tools"
	@$(PIP_INSTALL) --editable '.[all]'
	@echo "[4/4] torchrec"
	@$(PIP_INSTALL) --no-deps torchrec
	@touch $@

toolchain:
	@command -v $(firstword $(CXX)) >/dev/null || { \
	  echo "error: $(firstword $(CXX)) was not found: grc compiles C++ kernels" >&2; \
	  echo "hint: sudo apt-get install g++" >&2; exit 1; }

given-python: | toolchain
	@$(PY) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "error: $(PY) is not a Python from 3.11 to 3.13 that runs" >&2; \
	  echo "hint: make PYTHON=/path/to/python VENV=none" >&2; exit 1; }
	@$(PY) -c 'import importlib.util as u, sys; \
	names = "jinja2 networkx numpy pytest rich safetensors torch typer".split(); \
	missing = [name for name in names if u.find_spec(name) is None]; \
	missing and sys.exit("error: $(PY) lacks " + ", ".join(missing) + "\nhint: $(PY) -m pip install " + " ".join(missing))'
	@echo "$(PY) as it is (VENV=none): the wheel check is left out"
