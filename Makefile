# `make demo` and `make test` are all that a fresh machine with Python, git and make needs.
# With Go there as well, `make test` first builds what the stack is made of, which takes some
# minutes and is kept in the user's cache, as is the browser that reports are opened in.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH ?=
PORTS ?=
# Of each target of tests/fuzz; there are ten.
MINUTES ?= 6
COVERED ?= tests --ignore=tests/ops/stack --ignore=tests/bench --ignore=tests/fuzz
TARGET ?=
# At once, each with files of its own, in the order of tests/conftest.py: much of a test is waiting
# for processes it has started.
TEST_PROCESSES ?= 3
# Of make test-pythons: versions or paths (the newest that is here, without), and torch as well.
PYTHONS ?=
WITH_TORCH ?=

.PHONY: help demo test test-pythons fuzz test-deployed test-compose test-gpu bench coverage lint \
  lint-types lint-others format docs constraints clean collector stack stack-programs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(READY)  ## train a CNN through an injected fault, recorded only and recovered; then let one grow
	$(BIN)/python -m examples.demo

test: $(READY)  ## run the tests; those of the stack where its programs can be had
	@$(BIN)/python -m ops.stack build --if-possible
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-pythons: $(READY)  ## run the tests without torch on the newest Python here (PYTHONS="3.12 …")
	@$(BIN)/python -m ops.pythons --processes $(TEST_PROCESSES) \
	  $(if $(WITH_TORCH),--torch) $(PYTHONS)

fuzz: $(READY)  ## send odd input to every entrance, MINUTES=6 to each (TARGET=name for one)
	FUZZ_MINUTES=$(MINUTES) FUZZ_TARGET="$(TARGET)" \
	  $(BIN)/python -m pytest -s -n 0 --timeout 0 tests/fuzz

test-deployed: $(READY)  ## build the images' programs (takes long), and run the stack's tests on them
	@$(BIN)/python -m ops.stack as-deployed $(BIN)/python -m pytest tests/ops/stack tests/ops/alerts

test-compose: $(READY)  ## run the compose stack in a Docker engine, with stand-ins for images
	@$(BIN)/python -m ops.compose_check

test-gpu:  ## check the GPU promises on a GPU (with PYTHON as it is; installs nothing)
	@$(PYTHON) -m ops.gpu_check

collector: $(READY)  ## build our Collector, once: it is kept in the user's cache
	@$(BIN)/python -m ops.stack build collector

stack-programs: $(READY)  ## get the stack's programs, and those of tests, each once
	@$(BIN)/python -m ops.stack build

stack: $(READY)  ## run Collector, Prometheus, Jaeger and Tamiyo here (PORTS="jaeger=16687 …")
	@$(BIN)/python -m ops.stack up $(if $(PORTS),--port "$(PORTS)")

bench: $(READY)  ## run the benchmarks (BENCH=name for one); writes bench/RESULTS.md
	$(BIN)/python -m bench $(BENCH)

docs: $(READY)  ## build the documentation site into build/site
	@$(BIN)/python -m ops.site

pictures: $(READY)  ## make the pictures of the docs anew, which takes minutes
	$(BIN)/python -m ops.pictures

coverage: $(READY)  ## run the tests (not those of the stack) and show coverage by package
	@rm -rf build/coverage
	@$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(TEST_PROCESSES) --dist loadfile $(COVERED); \
	  status=$$?; \
	  $(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage html --quiet && \
	  $(BIN)/python -m ops.coverage_table && exit $$status

# Two at once, each with its output in one piece where this make can give it so.
lint: $(READY)  ## check style, types, English, pictures and generated files
	@$(MAKE) --no-print-directory --jobs=2 \
	  $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) lint-types lint-others

lint-types: $(READY)
	$(BIN)/mypy

lint-others: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m ops.english
	$(BIN)/python -m ops.generate --check
	$(BIN)/python -m ops.pictures --check
	$(BIN)/python -m bench.topology --check
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yaml

format: $(READY)  ## format the code, and regenerate files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m ops.generate
	$(BIN)/python -m bench.topology

# Of the versions that are there, those stay that fit; UPGRADE=--upgrade takes the newest of all.
UPGRADE ?=
constraints: $(READY)  ## choose the versions of constraints.txt anew, for every Python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip compile --quiet --universal --fork-strategy fewest \
	  --python-version 3.11 --extra demo --extra dev --extra docs --extra export --strip-extras \
	  --no-annotate --custom-compile-command "make constraints" $(UPGRADE) \
	  --output-file constraints.txt pyproject.toml

clean:  ## remove the virtual environments and caches
	rm -rf $(VENV) $(VENV)-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* build recordings

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; PYTHON=/path/to/python3.12 make ... names another"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time fetches PyTorch, a few GB ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -c constraints.txt -e '.[demo,dev,docs]'
	@touch $@
