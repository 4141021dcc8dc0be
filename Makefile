# make quickstart | test | lab ; the rest serves these three.
.DEFAULT_GOAL := help
.PHONY: help install quickstart test lab readme lock clean notebooks lessons pytest rooms style

PYTHON ?= python3
BIN := .venv/bin
export BENTOML_DO_NOT_TRACK := True
# LightGBM finds OpenMP here (see `install`)
export LD_LIBRARY_PATH := $(CURDIR)/.venv/lib$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))

help:            ## what can be made
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 14

install: .venv/.done   ## .venv with everything in requirements.lock
.venv/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), f"the lock is for Python 3.11, this is {sys.version.split()[0]}: make PYTHON=python3.11"'
	@$(PYTHON) -c 'import ensurepip' || { echo "Python has no venv here: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@# LightGBM needs the system's libgomp.so.1, which a bare Debian lacks; scikit-learn brings one
	ln -sf $$(cd .venv/lib && ls python3.11/site-packages/scikit_learn.libs/libgomp*) .venv/lib/libgomp.so.1
	@touch $@

.venv/.test: .venv/.done requirements-test.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-test.lock
	@touch $@

quickstart: install   ## from raw payments to a served, verified score, in under five minutes
	$(BIN)/fraudlab run params/pipelines/quickstart.yaml

lab: install     ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root)

test: .venv/.test notebooks rooms style lessons pytest   ## the whole suite

notebooks:       ## clean, and in step with the package and the README
	$(BIN)/python .ci/notebooks.py
# programs are small and run once: XLA optimises them less, and what one process has compiled, the others find; longest files first
TESTS := JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
lessons:         ## the notebooks' lesson cells
	$(TESTS) $(BIN)/nbdev-test --n-workers 2 --timing $(if $(shell command -v java),,--skip-file-re '^[_.]|spark')
pytest:
	$(TESTS) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_quickstart.py tests/test_studies.py tests/test_audit.py tests
rooms:           ## a room imports only from rooms with smaller numbers
	$(BIN)/lint-imports
style:
	$(BIN)/ruff check && $(BIN)/ruff format --check --quiet

readme: install  ## README.md from nbs/index.ipynb
	$(BIN)/python .ci/notebooks.py --readme

LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11
lock:            ## requirements.lock and requirements-test.lock from pyproject.toml
	$(LOCK) --extra lab --extra train --extra dev pyproject.toml -o requirements.lock
	$(LOCK) --group test -c requirements.lock -o requirements-test.lock

clean:           ## remove the environment and what building left
	rm -rf .venv build dist *.egg-info
