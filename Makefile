# Every target says what it does in `make help`. PROFILE chooses the settings in data/profiles/.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
PROFILE ?= laptop
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
# Nothing is fetched once the packages are installed; two profiles read from the model hub.
OFFLINE := $(if $(filter small paper,$(PROFILE)),,HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1)
RUN := $(OFFLINE) TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/
# Two processes of one thread each; the tests of a file, and all of the book's, run in one process.
PYTEST := OMP_NUM_THREADS=1 $(RUN)python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env lock lint format test test-fast book preview book-student book-pdf ablation rivals train study study-full
.PHONY: bench paper-check reference check-records interop wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

env: $(VENV)/.installed ## build the environment in .venv from the two locks

$(VENV)/.installed: requirements.lock data.lock pyproject.toml
	@echo "building the environment in $(VENV) (about 6.5 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r data.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

lock: ## resolve the two locks anew from pyproject.toml
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-annotate -q -o requirements.lock
	uv pip compile --group data --universal --python-version 3.11 --generate-hashes --no-annotate -q -o data.lock

book: env ## run the pipeline and the notebooks of PROFILE and render book/_build/html/index.html
	$(RUN)moeits run --profile $(PROFILE)

preview: env ## render the book from the committed records of PROFILE, and measure nothing
	$(RUN)moeits run --profile $(PROFILE) --preview

book-student: env ## the same without the solutions of the exercises, as book/_build/student/index.html
	$(RUN)moeits run --profile $(PROFILE) --student

book-pdf: env ## render the book as PDF, where LaTeX is installed
	@command -v latexmk >/dev/null && command -v xelatex >/dev/null || { \
	    echo "a PDF needs LaTeX: install latexmk and xelatex (on Debian: latexmk texlive-xetex" \
	        "texlive-latex-extra texlive-fonts-extra fonts-freefont-otf), or print pages of book/_build/html from a browser"; exit 1; }
	$(RUN)moeits run --profile $(PROFILE)
	$(BIN)/jupyter-book build book --builder pdflatex --path-output book/_build/pdf

test: env lint ## run every test: package, notebooks and book in the smoke profile
	$(PYTEST)

test-fast: env ## run the tests that take three minutes: five families, no book, no browser
	$(PYTEST) -m "not slow and not book and not family"

lint: env ## check the style of the package, the tests and the notebooks, and which module imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: env ## format the code and strip the notebooks' outputs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb

ablation: env ## measure the whole tau grid of MODEL (all models without it) in PROFILE
	$(RUN)moeits ablate $(MODEL) --profile $(PROFILE)

rivals: env ## measure all methods at equal budgets in PROFILE, several at once
	$(RUN)moeits rivals --profile $(PROFILE) --backend loky

train: env ## train MODEL of data/models and what it needs (all models without it: hours; resumes)
	$(RUN)moeits train $(MODEL)

study: env ## measure what the study says of the trained models, where it has no record yet
	$(RUN)moeits study

study-full: env ## the same, and the upper bounds, planted duplicates and healing (hours; resumes)
	$(RUN)moeits study --full

bench: env ## time the NMI on layers of the paper's exact shapes, and the scoring of questions
	$(RUN)python benchmarks/nmi.py
	$(RUN)python benchmarks/evaluation.py

paper-check: env ## take the whole chain through stand-ins of the paper's models at full width
	$(RUN)python benchmarks/standins.py

check-records: env ## measure a few of the records in data/reference again, and compare (some minutes)
	$(RUN)python -m moeits.study.reference --check

reference: env ## copy the laptop profile's records to data/reference and their table into the README
	$(RUN)python -m moeits.study.reference

interop: env ## build llama.cpp in .interop and compare logits of pruned GGUF files with those of transformers
	@test -x .interop/bin/python || $(PYTHON) -m venv .interop
	.interop/bin/python -m pip install --quiet --disable-pip-version-check --no-binary llama-cpp-python llama-cpp-python==0.3.36
	$(RUN)python tests/unit/llama_cpp_logits.py .interop/bin/python

wheel: env ## build the package alone, the library and what it can do without this repository, into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean: ## delete the built book, the executed notebooks and the figures (models and records stay)
	rm -rf book/_build book/notebooks data/figures
