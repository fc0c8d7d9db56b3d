# make demo | test | lint, from a bare machine with Python 3.11+ and make. The environment is made once and reused.
#
#   VENV         where the environment lies                              (.venv)
#   PYTHON       the interpreter that makes it                           (python3)
#   TORCH_INDEX  index to take torch from, to avoid the CUDA build, e.g. https://download.pytorch.org/whl/cpu
#   EXTRAS       optional dependencies to install                        (test,judge)
#   WHEEL        a built wheel to install and test instead of this tree  (none: editable install)
#   PYTEST_ARGS  arguments for pytest (-m 'not slow'); empty runs everything, "-k geneval" a part

VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= test,judge
PYTEST_ARGS ?= -m 'not slow'
RUFF := ruff>=0.17,<0.18

ROOT := $(CURDIR)
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed$(if $(WHEEL),-wheel)-$(EXTRAS)

.PHONY: help demo test lint
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml $(WHEEL) | $(BIN)/python
	$(if $(TORCH_INDEX),$(BIN)/pip install --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/pip install $(if $(WHEEL),'$(WHEEL)[$(EXTRAS)]',-e '.[$(EXTRAS)]')
	touch $@

$(VENV)/.ruff: Makefile | $(BIN)/python
	$(BIN)/pip install '$(RUFF)'
	touch $@

demo: $(STAMP)
	$(BIN)/visearch demo --out outputs/demo

# pytest starts outside the repository: inside it, `import rewards` works by accident and hides a packaging fault.
test: $(STAMP)
	@elsewhere=$$(mktemp -d) && trap 'rm -rf "$$elsewhere"' EXIT && cd "$$elsewhere" && \
	VISEARCH_EXPECT_WHEEL=$(if $(WHEEL),1,0) $(BIN)/pytest '$(ROOT)/tests' \
		-c '$(ROOT)/pyproject.toml' --rootdir '$(ROOT)' -p no:cacheprovider $(PYTEST_ARGS)

lint: $(VENV)/.ruff
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
