# The README's two commands: `make run` starts a node, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint browser clean

run: $(VENV)/.run
	$(BIN)/python -m node run $(ARGS)

# two files at a time; then, alone, the tests that start real nodes or measure their own process
LONG := not soak and not bench and not interop and not browser
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "$(LONG) and not (real or alone)" $(ARGS)
	$(BIN)/python -m pytest -q -m "$(LONG) and (real or alone)" $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages in Chromium, which apt-get brings where it may; elsewhere install it yourself
browser: $(VENV)/.test
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } || true
	-$(BIN)/python -m pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -q -m browser tests/browser $(ARGS) || [ $$? -eq 5 ] # 5: all of it was skipped, with a reason

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@echo 'Setting up .venv, once: PyTorch is large, this takes some minutes.'
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,clients,embeddings,adapters,private]'
	# libp2p brings trio-typing, whose stubs of an old trio would hide trio's own types from mypy
	$(BIN)/python -c 'import pathlib, shutil, sysconfig; shutil.rmtree(pathlib.Path(sysconfig.get_path("purelib"), "trio-stubs"), ignore_errors=True)'
	touch $@

clean:
	rm -rf $(VENV)
