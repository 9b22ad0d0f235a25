# Two commands do everything, set-up included, on a fresh Linux or macOS machine with Python 3.10 or later:
#     make demo      the main job on the embedded model: a table, a picture, generated text
#     make test      every notebook, the kernels in Triton's interpreter, and the pytest files but for their slow tests
# What may be overridden, as in `make test PYTHON=python3.12`:
#     PYTHON    the interpreter the environment is made with   (the first of python3, python3.13, ... that is new enough)
#     VENV      where the environment lives                    (.venv)
#     TORCH     what `pip install` is given for PyTorch, before anything else; options may follow, as in
#               TORCH='torch==2.13.0 --index-url URL' with the URL that PyTorch's install page shows for CPU, CUDA or ROCm builds
#     LOWEST    where `make test-lowest` keeps its environment (.venv-lowest; UV_TORCH_BACKEND=cpu takes PyTorch's CPU build)
#     OLDEST    the interpreter of that environment            (the first of python3.10, python3.11, python3.12 that is here)
#     PARTS     which parts `make gpu` runs, as in PARTS="smoke bench" (all; the head of tests/gpu.sh says what they are)
#     MODELS, DATA   folders that `make gpu-files` cuts into pieces, a path with spaces in quotes of its own: MODELS="'a b' c"   (none)
#     PACKAGE   where `make wheel-check` and `make run-all` install the wheel   (.venv-package)
#     PAGES     parts of the names of the pages that `make run-all` runs, as in PAGES="05_ window"   (all)
#     WORKERS   how many notebooks or test files run at a time (the cores of this machine, 8 at most)

VENV    ?= .venv
TORCH   ?= torch==2.13.0
WORKERS ?= $(shell n=`getconf _NPROCESSORS_ONLN`; [ $$n -gt 8 ] && n=8; echo $$n)
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)

LOWEST  ?= .venv-lowest
PACKAGE ?= .venv-package
PACKED   = $(FACTS) MANIFEST.in README.md $(shell find hedgehog_nb results -type f -not -name '*.pyc')
OLDEST  ?= $(shell for p in python3.10 python3.11 python3.12; do $$p --version >/dev/null 2>&1 && { echo $$p; break; }; done)

BIN   := $(abspath $(VENV))/bin
# Bytecode is written as it is needed, not for every installed file at once
PIP   := PIP_NO_COMPILE=1 $(BIN)/python -m pip --disable-pip-version-check install
# uv takes a quarter of pip's time and leaves the PyTorch that is there; what it cannot install, pip does
REST   = $(PIP) -q uv && $(BIN)/uv pip install -q --python $(BIN)/python -e $(1) || { echo "uv could not install it, pip tries now" >&2; $(PIP) -q -e $(1); }
FACTS := settings.ini setup.py pyproject.toml
# One thread a worker; no test reaches the network
TEST  := PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
NBS   := $(TEST) nbdev-test --n-workers $(WORKERS) --timing
# The notebooks that take longest go first: one that starts last keeps one worker only
LONG  := ^(09_training|94_cli)

.PHONY: help demo test test-slow test-lowest test-all wheel-check run-all gpu gpu-smoke gpu-tests gpu-sanitize gpu-bench gpu-models gpu-files sync site-check preview docs readme results hooks clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@echo "make TARGET, where TARGET is one of (the head of the Makefile says what can be overridden):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.stamp-core  ## Set up, then convert the embedded model: perplexities, a figure, generated text
	@PATH="$(BIN):$$PATH" hedgehog demo

test: $(VENV)/.stamp-dev  ## Set up, then test the notebooks, the kernels (in Triton's interpreter) and tests/ but for its slow tests
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  echo "== notebooks" && $(NBS) --file-re '$(LONG)' && $(NBS) --skip-file-re '^[_.]|$(LONG)' && \
	  echo "== kernels, in Triton's interpreter" && $(TEST) TRITON_INTERPRET=1 nbdev-test kernels --flags triton --n-workers $(WORKERS) --timing; \
	else \
	  echo "== notebooks (no Triton on this system: kernels/ is left out)" && $(NBS) nbs --file-re '$(LONG)' && $(NBS) nbs --skip-file-re '^[_.]|$(LONG)'; \
	fi
	@echo "== tests" && $(TEST) python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-lowest: $(LOWEST)/.stamp-lowest  ## The same tests, with the lowest versions that settings.ini allows, in an environment of their own
	@$(MAKE) --no-print-directory test VENV=$(LOWEST)

test-slow: $(VENV)/.stamp-dev  ## The slow tests of tests/ alone
	@echo "== slow tests" && $(TEST) python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m slow tests

test-all: test test-slow run-all  ## `make test`, its slow tests, every page run as a user does, then converted models in more tools, then in transformers' own tests (pip fetches both)
	@$(PIP) -q -e '.[integrations]' && echo "== tools" && INTEGRATIONS=all $(TEST) python -m pytest -q -n $(WORKERS) tests/test_integrations.py
	@$(PIP) -q parameterized && v=`$(BIN)/python -c 'from transformers import __version__ as v; print(v)'` && d=_data/transformers-$$v && \
	  { [ -n "$$TRANSFORMERS_SOURCE" ] || [ -d $$d ] || { mkdir -p _data && $(BIN)/python -m pip -q download --no-binary transformers --no-deps -d _data transformers==$$v && tar xzf $$d.tar.gz -C _data; }; } && \
	  echo "== transformers' own tests" && TRANSFORMERS_SOURCE=$${TRANSFORMERS_SOURCE:-$$d} $(TEST) python -m pytest -q -n $(WORKERS) -o addopts= -W ignore::pytest.PytestUnraisableExceptionWarning tests/mixins.py

wheel-check: $(PACKAGE)/.stamp  ## Build wheel and sdist into dist, install the wheel in an environment without nbdev, run the demo and a smoke test there
	@d=`mktemp -d` && cd $$d && unset PYTHONPATH && PATH="$(abspath $(PACKAGE))/bin:$$PATH" && hedgehog demo && python $(CURDIR)/tests/wheel_smoke.py; s=$$?; rm -rf $$d; exit $$s

run-all: $(PACKAGE)/.stamp  ## Run every page from the first cell to the last, with the installed wheel alone, in an empty folder
	@$(abspath $(PACKAGE))/bin/python -m pip --disable-pip-version-check install -q nbclient ipykernel
	@PATH="$(abspath $(PACKAGE))/bin:$$PATH" HF_HUB_OFFLINE=1 python tests/run_all.py $(PAGES)

gpu:  ## On a GPU machine: smoke test, kernels' tests, sanitizer, benchmark, models, 9 minutes each (gpu-smoke, gpu-tests, ... one of them)
	@tests/gpu.sh $(PARTS)

gpu-smoke gpu-tests gpu-sanitize gpu-bench gpu-models: gpu-%:
	@tests/gpu.sh $*

gpu-files:  ## What a GPU machine without a network lacks, in folders of 45 MB: .gpu/1, .gpu/2, ...
	@$(PYTHON) tests/gpu_files.py --into .gpu --models $(MODELS) --data $(DATA)

sync: $(VENV)/.stamp-dev  ## Check that modules equal their notebooks and that the notebooks are clean (works on a copy)
	@PATH="$(BIN):$$PATH" .ci/sync

site-check: $(VENV)/.stamp-dev  ## Process the pages for the site and list what is wrong with them (needs no Quarto, works on a copy)
	@$(TEST) python -c 'import sys; from hedgehog_nb.site import check_site; sys.exit(check_site(n_workers=$(WORKERS)))'

preview: $(VENV)/.stamp-dev  ## The site as HTML in _preview, without Quarto (needs pandoc; takes screenshots where Chromium is)
	@$(TEST) python -c 'from hedgehog_nb.site import preview_site; preview_site(n_workers=$(WORKERS))'

docs: $(VENV)/.stamp-dev  ## Build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto, which pip cannot install: see https://quarto.org/docs/get-started, then run make docs again." >&2; exit 1; }
	@PATH="$(BIN):$$PATH" nbdev-docs

results: $(VENV)/.stamp-dev  ## Check the numbers in the text of pages and README: tests of the pages on results/, then what no test or saved table shows
	@$(NBS) nbs --file-re "^(`cd nbs && grep -l read_results *.ipynb | sed 's/\.ipynb$$//' | paste -sd'|'`)\.ipynb$$"
	@$(TEST) python -m pytest -q tests/test_results.py tests/test_packaging.py -k "numbers or readme"

readme: $(VENV)/.stamp-dev  ## Write README.md from nbs/index.ipynb (Quarto is not needed)
	@$(BIN)/python -c 'from hedgehog_nb.docs import write_readme; write_readme()'

hooks: $(VENV)/.stamp-dev  ## Install nbdev's git and Jupyter hooks, and pre-commit's where that is installed
	@PATH="$(BIN):$$PATH" nbdev-install-hooks
	@if command -v pre-commit >/dev/null; then pre-commit install; fi

clean:  ## Remove what builds and tests leave behind; the environment stays
	rm -rf build dist _docs _proc _preview .pytest_cache .hypothesis
	find hedgehog_nb nbs kernels tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The environment: PyTorch first, so that a CPU build is kept where the package index has one, then the library.
# A stamp is older than the files it depends on only when they changed, so a second run has nothing to do.
$(VENV)/.stamp-torch:
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.10 or later found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is not a Python 3.10 or later: name one with PYTHON=..." >&2; exit 1; }
	@echo "== Setting up $(VENV) with `$(PYTHON) --version`: once, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH) || { echo "PyTorch could not be installed: name another build with TORCH=... (see the head of the Makefile; Intel Macs have none since 2.3)" >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-torch $(FACTS)
	@echo "== Installing hedgehog_nb and what it needs into $(VENV)"
	@$(call REST,.)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(FACTS)
	@echo "== Installing hedgehog_nb, what it needs and what its tests need into $(VENV)"
	@$(call REST,'.[dev]')
	@touch $(VENV)/.stamp-core $@

# What somebody has who typed `pip install hedgehog_nb`: the wheel, built of what is here now, and what it needs
$(PACKAGE)/.stamp: $(VENV)/.stamp-dev $(PACKED)
	@rm -rf build dist && $(BIN)/python -m build -q . && ls dist
	@[ -x $(PACKAGE)/bin/python ] || { $(PYTHON) -m venv $(PACKAGE) && $(abspath $(PACKAGE))/bin/python -m pip --disable-pip-version-check install -q $(TORCH); }
	@$(abspath $(PACKAGE))/bin/python -m pip --disable-pip-version-check install -q dist/*.whl && $(abspath $(PACKAGE))/bin/python -m pip --disable-pip-version-check install -q --no-deps --force-reinstall dist/*.whl
	@touch $@

# Only the direct requirements are lowered: what they need in turn is taken as new as it fits. The stamps are those that `make test` looks at.
$(LOWEST)/.stamp-lowest: $(FACTS)
	@[ -n "$(OLDEST)" ] || { echo "No Python 3.10, 3.11 or 3.12 found, and the lowest versions have no builds for later ones: name one with OLDEST=..." >&2; exit 1; }
	@echo "== Installing the lowest versions of what hedgehog_nb needs into $(LOWEST), with `$(OLDEST) --version`"
	@$(OLDEST) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q uv
	@$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --extra dev --extra docs --extra gguf -r pyproject.toml
	@$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python -q --no-deps -e .
	@touch $(LOWEST)/.stamp-torch $(LOWEST)/.stamp-core $(LOWEST)/.stamp-dev $@
