# Every target sets itself up in ./.venv on first use. PYTHON=... picks an interpreter, ARGS="..." is passed on.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
VENV36 ?= .venv-triton36
BIN := $(VENV)/bin
TORCH ?= torch
ARGS ?=
PIP_FLAGS := --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint typecheck bench gpu-suite gpu-sanitize compile-triton36 sheet picture clean

demo: $(VENV)/demo.ok ; $(BIN)/python -m treespec demo $(ARGS)
# One process a core, whole files each: tests run on one thread, and files share what they compile.
test: $(VENV)/test.ok ; $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)
lint: $(VENV)/dev.ok ; $(BIN)/python -m ruff check .
typecheck: $(VENV)/dev.ok ; $(BIN)/python -m mypy
bench: $(VENV)/bench.ok ; $(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/out.json $(ARGS)
gpu-suite: $(VENV)/bench.ok ; $(BIN)/python benchmarks/gpu_suite.py $(ARGS)
gpu-sanitize: $(VENV)/test.ok ; for t in memcheck racecheck initcheck; do compute-sanitizer --tool $$t --error-exitcode 1 $(BIN)/python -m pytest tests/kernels -q -m gpu $(ARGS) || exit 1; done
compile-triton36: $(VENV36)/test.ok ; $(VENV36)/bin/python benchmarks/kernel_sheet.py --check-compiles && $(VENV36)/bin/python -m pytest -m compile $(ARGS)
sheet: $(VENV)/test.ok ; $(BIN)/python benchmarks/kernel_sheet.py
picture: ; $(PYTHON) docs/make_picture.py
clean: ; rm -rf $(VENV) $(VENV36) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

# torch comes first and alone; each marker file below remembers that its extra is installed.
$(VENV)/torch.ok $(VENV36)/torch.ok: constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 >= 3.10 with ensurepip found; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(@D) with $(PYTHON) (once; torch is the large part)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	@touch $@
$(VENV)/demo.ok: EXTRA = cli
$(VENV)/test.ok: EXTRA = test
$(VENV)/dev.ok: EXTRA = dev
$(VENV)/bench.ok: EXTRA = bench
$(VENV)/demo.ok $(VENV)/test.ok $(VENV)/dev.ok $(VENV)/bench.ok: $(VENV)/torch.ok pyproject.toml setup.py
	@echo "installing treespeculator[$(EXTRA)] into $(@D)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-build-isolation -e ".[$(EXTRA)]"
	@touch $@
$(VENV36)/test.ok: $(VENV36)/torch.ok pyproject.toml setup.py
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation -e ".[test]" triton==3.6.0
	@touch $@
