# Every command of the project; `make` alone lists them. Needs Python 3.11 or newer and make.

PYTHON ?= python3
VENV ?= .venv
# An index of CPU builds of torch for pip to look at as well. Without one, and on Linux, pip may take
# the build for CUDA, which is some gigabytes larger and works as well.
TORCH_INDEX ?=
PIP_FLAGS ?=
# The model repository of `make models` and `make serve`. The demo and the benchmark have one of their
# own, so that the untrained networks they may make are never served to anybody by mistake.
REPO ?= model_repo/engines
SCRATCH ?= .demo
ARGS ?=

PY := $(VENV)/bin/python
# Python compiles what it imports when it first does; pip would compile torch whole, which takes longer
# than installing it (measured: 304 s of processor time with, 110 s without).
PIP_INSTALL := $(PY) -m pip install --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_FLAGS)
# Stamps in the environment: what running takes, and what developing takes on top of it.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DEMO_MODELS := lenet5 resnet18
CODE := server model_repo clients proto deploy tests
# What an engine depends on.
BUILDER := pyproject.toml $(wildcard server/repository/*.py server/images/*.py \
	server/engines/*.py server/engines/tensorrt/*.py model_repo/*.py model_repo/architectures/*.py \
	model_repo/cards/*.toml model_repo/labels/*.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve models test lint format proto bench bench-cost bench-overload bench-swap bench-beside gpu-lane clean distclean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) REPO=$(REPO) TORCH_INDEX=$(TORCH_INDEX)"

demo: $(RUN) $(SCRATCH)/models.built $(SCRATCH)/digits.written ## build two models, serve them, classify every held-out digit and a photograph
	@echo "==> serving, and asking"
	$(PY) clients/demo.py --repo $(SCRATCH)/engines --digits $(SCRATCH)/digits $(ARGS)

models: MODEL ?= lenet5
models: $(RUN) ## build MODEL="NAME..." (lenet5; or --all) into REPO; more flags in ARGS
	$(PY) -m model_repo.build $(MODEL) --repo $(REPO) $(ARGS)

serve: $(RUN) ## serve REPO, after building lenet5 if it is empty; flags of the server in ARGS
	@ls $(REPO)/*/*/manifest.json >/dev/null 2>&1 || $(MAKE) --no-print-directory models ARGS=
	$(PY) -m server --repo $(REPO) $(ARGS)

test: lint ## lint, check types, run all tests, a process for each core
	$(PY) -m pytest -n auto --dist loadfile $(ARGS)

lint: $(DEV) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(CODE)

format: $(DEV) ## rewrite the code as lint wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

proto: $(DEV) ## generate the stubs of proto/*.proto
	$(PY) proto/generate.py

bench: MODELS ?= resnet50 lenet5 resnet18
bench: $(DEV) ## measure MODELS (or all) behind gRPC and bare, and write docs/benchmarks/cpu.md; MODEL=NAME: one, no page
	$(if $(MODEL),\
	$(PY) -m tests.benchmarks.serving --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS),\
	$(PY) -m tests.benchmarks.page --models $(MODELS) --repo $(SCRATCH)/engines $(ARGS))

bench-cost: MODEL ?= lenet5
bench-cost: $(DEV) ## processor time of a call of MODEL (lenet5), by part of the server
	$(PY) -m tests.benchmarks.cost --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

bench-overload: MODEL ?= resnet50
bench-overload: $(DEV) ## offer MODEL (resnet50) 0.5 to 4 times what it can serve, under both policies
	$(PY) -m tests.benchmarks.overload --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

bench-swap: MODEL ?= resnet50
bench-swap: $(DEV) ## publish versions of MODEL (resnet50) under load: calls lost, and their latency
	$(PY) -m tests.benchmarks.swap --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

bench-beside: MODEL ?= resnet50
bench-beside: $(DEV) ## clients/bench.py beside perf_analyzer, which ARGS="--perf-analyzer PATH" names
	$(PY) -m tests.benchmarks.beside --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

gpu-lane: OUT ?= .gpu-lane
gpu-lane: ## check and measure the engines on this machine's GPU, by VENV or else PYTHON; results in OUT
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tests.gpu.lane --out $(OUT) $(ARGS)

clean: ## remove the demo's models and all caches; the environment and REPO stay
	rm -rf $(SCRATCH) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environment
	rm -rf $(VENV)

$(RUN): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"convserve needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	@echo "==> installing into $(VENV): some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e './clients/convserve_client[bench]' -e '.[cpu,build]'
	@touch $@

$(DEV): $(RUN)
	@echo "==> installing the tools of development"
	$(PIP_INSTALL) -e './clients/convserve_client[bench,hdr,mlperf,report]' -e '.[cpu,gpu,build,dev]'
	@touch $@

# The public weights of resnet18 may be out of reach; those of lenet5 are trained here.
$(SCRATCH)/models.built: $(BUILDER) | $(RUN)
	@echo "==> building $(DEMO_MODELS)"
	@rm -rf $(addprefix $(SCRATCH)/engines/,$(DEMO_MODELS))
	$(PY) -m model_repo.build $(DEMO_MODELS) --repo $(SCRATCH)/engines --or-random
	@touch $@

$(SCRATCH)/digits.written: model_repo/digits.py | $(RUN)
	@echo "==> writing the held-out digits as PNG files"
	@rm -rf $(SCRATCH)/digits
	$(PY) -m model_repo.digits $(SCRATCH)/digits
	@touch $@
