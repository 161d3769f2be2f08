# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow smoke lint docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## Prune a real language model and show what it cost
	$(BIN)/billhook prune demo --method sparsegpt --sparsity 0.5 --out out/demo
	$(BIN)/billhook eval out/demo
	@echo "Open out/demo/report.html in a browser."

test: $(VENV)/.installed  ## Unit tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --durations 8 -m "not slow"

slow: $(VENV)/.installed  ## Tests on the demo model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --durations 8 -m slow

smoke: $(VENV)/.installed  ## The shortest of them that touch every part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --durations 8 -m smoke

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## Method cards, from what the methods declare
	$(BIN)/python docs/make_cards.py

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis
