# All commands of the project. `make` alone lists them. Needs Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
# An extra package index with CPU builds of torch. Without one, pip on Linux installs the CUDA build:
# it works too, but is some gigabytes larger.
TORCH_INDEX ?=
PIP_FLAGS ?=
# Model repository of `make models` and `make serve`. The demo and the benchmarks use another one,
# because they may build untrained networks, which must not be served by mistake.
REPO ?= model_repo/engines
SCRATCH ?= .demo
ARGS ?=

PY := $(VENV)/bin/python
# Without --no-compile pip compiles all of torch, which takes longer than the installation (measured:
# 304 s of processor time with, 110 s without). Python compiles modules at their first import.
PIP_INSTALL := $(PY) -m pip install --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_FLAGS)
# Sends a command's output to the log, and shows the end of the log if the command fails.
LOG := $(VENV)/install.log
INTO_LOG := > $(LOG) 2>&1 || { tail -n 30 $(LOG); echo "==> failed; all output is in $(LOG)"; exit 1; }
# Stamps in the environment: installed for running, and for development.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DEMO_MODELS := lenet5 resnet18
CODE := server model_repo clients proto deploy tests
# Files that an engine depends on.
BUILDER := pyproject.toml $(wildcard server/repository/*.py server/images/*.py \
	server/engines/*.py server/engines/tensorrt/*.py model_repo/*.py model_repo/architectures/*.py \
	model_repo/cards/*.toml model_repo/labels/*.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve models test lint format proto bench bench-cost bench-overload bench-swap bench-perf-analyzer attack fuzz gpu-lane clean distclean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) REPO=$(REPO) TORCH_INDEX=$(TORCH_INDEX)"

demo: $(RUN) $(SCRATCH)/models.built $(SCRATCH)/digits.written ## build two models, serve them, classify all held-out digits and a photograph
	@echo "==> starting a server and sending it images"
	@$(PY) clients/demo.py --repo $(SCRATCH)/engines --digits $(SCRATCH)/digits $(ARGS)

models: MODEL ?= lenet5
models: $(RUN) ## build MODEL="NAME..." (default lenet5; --all builds all) into REPO; more flags in ARGS
	$(PY) -m model_repo.build $(MODEL) --repo $(REPO) $(ARGS)

serve: $(RUN) ## serve REPO (builds lenet5 if it is empty); server flags in ARGS
	@ls $(REPO)/*/*/manifest.json >/dev/null 2>&1 || $(MAKE) --no-print-directory models ARGS=
	$(PY) -m server --repo $(REPO) $(ARGS)

test: lint ## lint, check types, run all tests on all cores
	$(PY) -m pytest -n auto --dist loadfile $(ARGS)

lint: $(DEV) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(CODE)

format: $(DEV) ## format the code and fix lint errors
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

proto: $(DEV) ## generate the stubs from proto/*.proto
	$(PY) proto/generate.py

bench: MODELS ?= resnet50 lenet5 resnet18
bench: $(DEV) ## measure MODELS served and bare, write docs/benchmarks/cpu.md; MODEL=NAME measures one
	$(if $(MODEL),\
	$(PY) -m tests.benchmarks.serving --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS),\
	$(PY) -m tests.benchmarks.page --models $(MODELS) --repo $(SCRATCH)/engines $(ARGS))

bench-cost: MODEL ?= lenet5
bench-cost: $(DEV) ## processor time per call of MODEL (lenet5), by part of the server
	$(PY) -m tests.benchmarks.cost --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

bench-overload: MODEL ?= resnet50
bench-overload: $(DEV) ## load MODEL (resnet50) with 0.5 to 4 times its capacity, with both schedulers
	$(PY) -m tests.benchmarks.overload --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

bench-swap: MODEL ?= resnet50
bench-swap: $(DEV) ## publish versions of MODEL (resnet50) under load; counts lost calls and latency
	$(PY) -m tests.benchmarks.swap --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

bench-perf-analyzer: MODEL ?= resnet50
bench-perf-analyzer: $(DEV) ## compare clients/bench.py with perf_analyzer: ARGS="--perf-analyzer PATH"
	$(PY) -m tests.benchmarks.perf_analyzer --model $(MODEL) --repo $(SCRATCH)/engines $(ARGS)

attack: $(DEV) $(SCRATCH)/models.built ## attack a server with every attack, beside grpcio; writes docs/benchmarks/attacks.md
	$(PY) -m tests.transport.attacks --repo $(SCRATCH)/engines $(ARGS)

fuzz: $(DEV) ## feed a million random inputs to all parsers: ARGS="--seconds 60 --seed 7"
	$(PY) -m tests.fuzz $(ARGS)

gpu-lane: OUT ?= .gpu-lane
gpu-lane: ## check and measure engines on this machine's GPU; results in OUT
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tests.gpu.lane --out $(OUT) $(ARGS)

clean: ## remove the demo's models and caches; keeps the environment and REPO
	rm -rf $(SCRATCH) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environment
	rm -rf $(VENV)

$(RUN): pyproject.toml clients/convserve_client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"convserve needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing into $(VENV); takes some minutes the first time; log: $(LOG)"
	@$(PIP_INSTALL) -e './clients/convserve_client[bench]' -e '.[cpu,build]' $(INTO_LOG)
	@touch $@

$(DEV): $(RUN)
	@echo "==> installing the development tools; log: $(LOG)"
	@$(PIP_INSTALL) -e './clients/convserve_client[bench,hdr,mlperf,report]' -e '.[cpu,gpu,build,dev]' $(INTO_LOG)
	@touch $@

# The public weights of resnet18 may be unreachable. Those of lenet5 are trained here.
$(SCRATCH)/models.built: $(BUILDER) | $(RUN)
	@echo "==> building models: $(DEMO_MODELS)"
	@rm -rf $(addprefix $(SCRATCH)/engines/,$(DEMO_MODELS))
	@$(PY) -m model_repo.build $(DEMO_MODELS) --repo $(SCRATCH)/engines --or-random
	@touch $@

$(SCRATCH)/digits.written: model_repo/digits.py | $(RUN)
	@echo "==> writing the held-out digits as PNG files"
	@rm -rf $(SCRATCH)/digits
	@$(PY) -m model_repo.digits $(SCRATCH)/digits
	@touch $@
