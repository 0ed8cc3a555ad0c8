PYTHON ?= python3
BIN := .venv/bin

help:  ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | sort

demo: .venv/installed  ## install, fetch a small real model, let it answer the example dialogs
	./download.sh smollm2
	$(BIN)/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir checkpoints/SmolLM2-135M-Instruct

test: .venv/installed-test  ## install what the tests need, fetch the two real assets, run everything
	./download.sh smollm2 tokenizer
	$(BIN)/python -m pytest

lint: .venv/installed-test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-test  ## measure against transformers and llama.cpp, side by side, and what is saved
	./download.sh smollm2
	$(BIN)/python -m benchmarks.peers --out benchmarks/results
	$(BIN)/python -m benchmarks.savings --out benchmarks/results

docs: .venv/installed-test  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove the environment and caches; downloaded models stay
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

.PHONY: help demo test lint bench docs clean
