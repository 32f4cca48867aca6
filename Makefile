# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
K8S_VERSION ?= v1.36.3
JOBS ?= 2
DOCKER ?= docker
BASE ?= python:3.12-slim
IMAGE ?= localmodel-agent:dev

.PHONY: demo test check bench docs lock image image-test control-plane clean

demo: $(READY)
	@$(BIN)/python -m docs.demo

test: $(READY)
	@if command -v go >/dev/null; then tests/controlplane/build.sh $(K8S_VERSION) >/dev/null; fi
	@K8S_VERSION=$(K8S_VERSION) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore tests/node
	@K8S_VERSION=$(K8S_VERSION) $(BIN)/python -m pytest tests/node # alone: it is the machine's one node

# Format, lint, types, import contracts, generated documents; then how long our files are.
check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m docs.generate --check
	@$(BIN)/python -m docs.budget

bench: $(READY)
	@$(BIN)/python -m bench

docs: $(READY)
	@$(BIN)/python -m docs.generate

# No uv.lock and no pylock.toml: both hold the address of whatever index they were made from.
lock: $(READY)
	@$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --generate-hashes \
	  --no-emit-index-url --no-header --quiet -o requirements.lock

# The image, by docker, podman or buildah: DOCKER=podman.
image:
	$(DOCKER) build --build-arg BASE=$(BASE) -t $(IMAGE) .

# The same Dockerfile on a base made of Debian packages, by an unpacked buildah: as the tests do it.
image-test: $(READY)
	@$(BIN)/python -m tests.node.image localmodel-agent.tar

# etcd and the Kubernetes binaries of the tests, from the Go module proxy, into a cache directory.
control-plane:
	@tests/controlplane/build.sh $(K8S_VERSION)

clean:
	rm -rf $(VENV) .demo .bench .mypy_cache .pytest_cache .ruff_cache .hypothesis

# uv where there is one, else pip: the same locked files either way.
$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing; set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed; set PYTHON=" >&2; exit 2; }
	@echo "making the environment in $(VENV) (once; about half a minute)"
	@rm -rf $(VENV)
	@if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then \
	  uv venv --quiet --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV) && \
	  uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock && \
	  uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e . ; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	    --only-binary :all: -r requirements.lock && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e . ; \
	fi
	@touch $(READY)
