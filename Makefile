PYTHON ?= python3
# Which torch: `cpu`, pytorch.org's small build; `cuda`, PyPI's for Linux, with CUDA's libraries
# (an environment of 6.5 GB); else what pip finds. Each has an environment of its own.
TORCH ?=
VENV := .venv$(TORCH:%=-%)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
ifeq ($(TORCH),cpu)
INSTALL_TORCH := $(PIP) --index-url https://download.pytorch.org/whl/cpu torch
else ifeq ($(TORCH),cuda)
# Whatever pip is configured to prefer. Certificates and proxies in the environment stay.
INSTALL_TORCH := env -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null $(PIP) torch
else ifneq ($(TORCH),)
$(error TORCH=$(TORCH): choose cpu or cuda)
endif

unexport TORCH MAKEFLAGS  # tests run make, too
# Where it is set, as in containers, each process of the tests would compile all that it imports.
export PYTHONDONTWRITEBYTECODE =

help:  ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | sort

demo: $(VENV)/installed  ## install, fetch a small real model, let it answer the example dialogs
	$(BIN)/llama download smollm2
	$(BIN)/torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir checkpoints/SmolLM2-135M-Instruct

test: $(VENV)/installed-test  ## run all tests, with what they need; TORCH=cpu or cuda chooses a torch
	$(BIN)/llama download smollm2 tokenizer
	-$(BIN)/python -c 'from llama.backends.cpu import kernels; kernels.add_types()'  # so that no test waits
	$(BIN)/python -m pytest

check: lint  ## style, types, and the quick tests of what has changed since upstream (a minute)
	$(BIN)/python -m pytest -m "not slow" $$($(BIN)/python tests/changed.py)

lint: $(VENV)/installed-test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-test  ## measure against transformers and llama.cpp, side by side, and what is saved
	$(BIN)/llama download smollm2
	$(BIN)/python -m benchmarks.peers --shape 1b --out benchmarks/results/1b
	$(BIN)/python -m benchmarks.peers --shape 8b --out benchmarks/results/8b
	$(BIN)/python -m benchmarks.peers --out benchmarks/results
	$(BIN)/python -m benchmarks.savings --out benchmarks/results
	$(BIN)/python -m benchmarks.serving --alone --out benchmarks/results
	$(BIN)/python -m benchmarks.finetuning
	$(BIN)/python -m benchmarks.planning --shape 1b --out benchmarks/results

soak: $(VENV)/installed-test  ## hours: thousands of random schedules, a day's traffic, servers under load, machines that fail
	$(BIN)/llama download smollm2
	LLAMA_THOROUGH=1 $(BIN)/python -m pytest
	LLAMA_SIMULATED_REQUESTS=100000 $(BIN)/python -m pytest -n 0 -s tests/engine/test_simulation.py
	LLAMA_LOAD_SECONDS=150 LLAMA_MUTATIONS=1000 LLAMA_CONNECTIONS=10000 \
		$(BIN)/python -m pytest -n 0 -s tests/server/test_hostile_clients.py
	LLAMA_MUTATIONS=200 $(BIN)/python -m pytest tests/checkpoint/test_schemes.py
	LLAMA_SCHEDULES=2000 LLAMA_REQUESTS=10000 $(BIN)/python -m pytest tests/engine/test_engine.py tests/engine/test_scheduler.py
	LLAMA_IMAGES=5000 $(BIN)/python -m pytest -n 0 tests/vision/test_vision_images.py
	LLAMA_NODE_STARTS=10 $(BIN)/python -m pytest -n 0 -s tests/test_nodes.py
	LLAMA_BATCH_LINES=2000 $(BIN)/python -m pytest -n 0 tests/apps/test_batch.py tests/ray/test_bulk.py
	LLAMA_RAY_NODES=2 $(BIN)/python -m pytest -n 0 tests/server/test_replicas.py tests/server/test_openai_sdk.py
	LLAMA_TRAINING=1 $(BIN)/python -m pytest -n 0 tests/training/test_devices.py

foreign: $(VENV)/installed-test  ## llama.cpp's tests of its server and other projects' clients, against ours
	$(BIN)/llama download smollm2
	$(BIN)/python tests/foreign/server_tests.py
	$(BIN)/python tests/foreign/clients.py

docs: $(VENV)/installed-test  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove the environments and caches; downloaded models stay
	rm -rf .venv .venv-cpu .venv-cuda build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	$(PIP) -e '.[server]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e '.[test]'
	touch $@

.PHONY: help demo test check lint bench soak foreign docs clean
