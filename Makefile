# Every target works alone on a fresh machine with Python >= 3.10 and a C++ compiler, and sets up what it needs once.
PYTHON ?= python3
PROMPT ?= Explain in two sentences why the sky is blue.
BIN := .venv/bin
# The distributions of this repository that are installed, editable; the first takes the extra "dev" for the tests.
EDITABLE := . plugins/text
SETUP := $(EDITABLE:%=%/pyproject.toml) tools/setup.sh
# A mirror configured for pip is a mirror for the models too.
INDEX = EDGE_RT_INDEX="$${EDGE_RT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null)}}"

.PHONY: help run test soak test-arm check bench docs clean
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 18

run: .venv/.ready  ## set up, fetch the default model, answer PROMPT
	@$(INDEX) $(BIN)/edge-rt pull smollm2 >/dev/null
	@echo "> $(PROMPT)"
	@$(BIN)/edge-rt run --temp 0 "$$PROMPT"

# One worker for each CPU; a file stays on one worker, for the daemons and models that its tests share. The heavy files come first, in tests/e2e.
test: .venv/.ready-dev  ## set up, run all tests, on all cores
	$(INDEX) $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

soak: .venv/.ready-dev  ## run the long tests that `make test` leaves out
	$(INDEX) $(BIN)/python -m pytest -m soak

test-arm: .venv/.ready-dev  ## run edge-rt on emulated ARM cores, see plugins/arm/README.md (long; needs the tools it names)
	$(INDEX) PYTHON=$(BIN)/python tools/test_arm.sh

check: .venv/.ready-dev  ## lint, types, imports, generated docs, links
	$(BIN)/ruff check .
	PYTHONPATH=plugins/arm:plugins/ascend:plugins/cuda:plugins/mlu:plugins/text $(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python tools/generate_cli_doc.py --check
	$(BIN)/python tools/generate_hooks_doc.py --check
	$(BIN)/python tools/generate_distill_doc.py --check
	$(BIN)/python tools/check_links.py

bench: .venv/.ready-dev  ## compare with llama-cpp-python, as docs/performance.md tells
	$(INDEX) $(BIN)/edge-rt pull smollm2 >/dev/null
	$(BIN)/python -m bench

docs: .venv/.ready-dev  ## write the generated docs
	$(BIN)/python tools/generate_cli_doc.py
	$(BIN)/python tools/generate_hooks_doc.py
	$(BIN)/python tools/generate_distill_doc.py

clean:  ## remove .venv and what tools leave (not the models in the cache)
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

export PROMPT

.venv/.ready: $(SETUP)
	tools/setup.sh $(PYTHON) "" $(EDITABLE)
	@touch $@

.venv/.ready-dev: $(SETUP)
	tools/setup.sh $(PYTHON) dev $(EDITABLE)
	@touch $@ .venv/.ready
