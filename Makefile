# Everything is one `make` away.  PYTHON is any Python from 3.9 on; the rest happens in a virtual environment of the project's own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TESTS  ?= tests
# Here, and where tests fetch what they compare with.
export PIP_RETRIES ?= 10
export PIP_DEFAULT_TIMEOUT ?= 60

.PHONY: demo test lint bench fuzz clean

demo: $(VENV)/.installed
	@$(BIN)/python -m vtdbg.demo

test: $(VENV)/.dev-installed lint
	sh tests/setup.sh
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --violations -t=3.9- vtdbg gdb_plugin windbg_plugin

bench: $(VENV)/.dev-installed
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

fuzz: $(VENV)/.dev-installed
	sh tests/setup.sh
	VTDBG_FUZZ_CASES=$${VTDBG_FUZZ_CASES:-200000} $(BIN)/python -m pytest tests/test_entry_processor.py tests/test_ept.py tests/test_svm_processor.py
	$(BIN)/python -m pytest --hypothesis-profile=random -m "not live"

$(VENV)/bin/python:
	@sh tests/make_venv.sh $(PYTHON) $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev-installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
