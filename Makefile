# `make run`: install, fetch the demo model once, generate from it.   `make test`: install and run every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile -c constraints.txt # of 15,000 modules Python compiles what it imports
PROMPT ?= Which city is the capital of France?

.PHONY: run test clean

run: $(VENV)/installed
	@model="$$($(BIN)/python -m seamwise.bench.demo_model)" && \
	$(BIN)/seamwise generate --model "$$model" --prompt "$(PROMPT)" --max-tokens 48 --next

test: $(VENV)/installed-dev
	@PATH="$(CURDIR)/$(BIN):$$PATH" ./check

# torch first and by its exact version: its CPU build then satisfies every other package.
$(VENV)/torch: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the other pinned packages into $(VENV) (a minute or two)"
	@$(INSTALL) torch setuptools wheel
	@touch $@

$(VENV)/installed: $(VENV)/torch
	@$(INSTALL) --no-build-isolation -e ".[gguf]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch
	@$(INSTALL) --no-build-isolation -e ".[gguf,plot,serve,grammar,test,dev]"
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build *.egg-info
