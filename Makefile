# Every target sets up .venv first when it is missing. Python 3.11 or newer, pip and make are enough.
PYTHON ?= python3
RUN := .venv/bin/python
ARGS ?=
PINS ?= -c requirements.lock
# The longest tests are in few files: who is done takes some of what the other still has.
SPREAD := -n auto --maxprocesses 8 --dist worksteal
# The newest JAX wants a newer Python than the lowest; PYENV_VERSION says which, where pyenv has it.
NEWEST ?= PYENV_VERSION=3.13 python3.13

.PHONY: help demo imdb notebooks test test-fast test-slow test-random long fuzz fuzz-guided test-aot test-newest docs bench wheel test-wheel lint format lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 10

demo: .venv/ready  ## train on the built-in corpus: no network beyond pip
	$(RUN) experiments/imdb.py --data demo $(ARGS)

imdb: .venv/ready  ## train on IMDB, downloaded and prepared once by TFDS
	$(RUN) experiments/imdb.py $(ARGS)

# Of each test a case: cells, contract, the scan beside the reference, layers, names and types.
test-fast: .venv/ready-test  ## while one writes: a minute and a half
	LSTMJAX_TEST_CASES=1 $(RUN) -m pytest $(SPREAD) -m "not alone and not slow" tests/test_cells.py \
		tests/test_contract.py tests/test_every_cell.py tests/test_layers.py tests/test_reprs.py tests/test_types.py $(ARGS)

test: .venv/ready-test  ## the tests, but for those that are slow
	$(RUN) -m pytest $(SPREAD) -m "not alone and not slow" $(ARGS) || [ $$? = 5 -a "$(ARGS)" ]  # 5: none
	$(RUN) -m pytest -m alone $(ARGS) || [ $$? = 5 -a "$(ARGS)" ]

# Shapes and types are the shorter tests' matter: to check them takes time.
test-slow: .venv/ready-test  ## the others: more cases of the same, long runs, 200 random steps
	LSTMJAX_TEST_TYPES=0 LSTMJAX_RANDOM_STEPS=$${LSTMJAX_RANDOM_STEPS:-200} $(RUN) -m pytest $(SPREAD) -m slow $(ARGS)

test-random: .venv/ready-test  ## engines against the plain scan on 5,000 random steps: two hours and a half
	LSTMJAX_TEST_TYPES=0 LSTMJAX_RANDOM_STEPS=5000 $(RUN) -m pytest $(SPREAD) tests/test_random_steps.py $(ARGS)
	LSTMJAX_TEST_LONG=1 $(RUN) -m pytest $(SPREAD) tests/test_kernels_cpu.py $(ARGS)

# Machines are slow at that: one test at a time, then the page of what was found.
long: .venv/ready-test  ## what takes long: every crash, failing disks, verdicts of known truth; writes docs/reliability.md
	rm -f build/told.jsonl && mkdir -p build
	LSTMJAX_TEST_LONG=1 LSTMJAX_TEST_REPORT=$(CURDIR)/build/told.jsonl $(RUN) -m pytest \
		tests/test_crashes.py tests/test_faults.py tests/test_processes.py tests/test_long.py tests/test_fuzz.py \
		tests/test_calibration.py $(ARGS)
	$(RUN) tests/reliability.py build/told.jsonl

fuzz: .venv/ready-test  ## hostile input to every reader, more than 100,000 cases
	LSTMJAX_TEST_LONG=1 $(RUN) -m pytest $(SPREAD) tests/test_fuzz.py $(ARGS)

fuzz-guided: .venv/ready-test  ## the same guided by coverage, a minute a reader; Linux, by atheris
	$(RUN) -m pip install --quiet --disable-pip-version-check atheris
	for reader in archive arrays config csv jsonl metrics parameters task; do \
		$(RUN) tests/fuzz_guided.py $$reader -max_total_time=60 $(ARGS) || exit 1; done

notebooks: .venv/ready  ## execute the notebooks of docs/ anew: ARGS="tutorial comparing" those
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[notebooks]'
	$(RUN) tests/notebooks.py $(ARGS)

# Not with --quiet: warnings that are not shown are no errors either.
docs: .venv-docs/ready  ## the site, build/site/index.html; a dead link, or a warning, is an error
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS) >build/site.log 2>&1 || { cat build/site.log; exit 1; }

test-aot: .venv-aot/ready  ## kernels compiled for TPU and Hopper by the real compilers, no device needed
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -n auto --maxprocesses 4 tests/test_aot.py tests/test_aot_gpu.py $(ARGS)

test-newest: .venv-newest/ready  ## the kernels with the newest JAX and the oldest llvmlite
	JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -n auto --maxprocesses 4 tests/test_kernels_gpu.py \
		tests/test_kernels_tpu.py tests/test_races_gpu.py tests/test_races_tpu.py tests/test_aot_gpu.py \
		tests/test_contract.py::test_explicit_sharding $(ARGS)
	JAX_PLATFORMS=cpu LSTMJAX_TEST_CASES=1 .venv-newest/bin/python -m pytest -n auto --maxprocesses 4 \
		tests/test_kernels_cpu.py tests/test_cpu_emission.py tests/test_cpu_emulated.py $(ARGS)

bench: .venv/ready-bench  ## side by side with what a user would take instead
	$(RUN) -m benchmarks $(ARGS)

lint: .venv/ready-lint  ## style, format, types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/ready-lint  ## let ruff put right what it can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# From the files that git knows, copied: what else lies here does not get in.
wheel: .venv/ready  ## wheel and sdist, in dist/
	rm -rf dist build/source && mkdir -p build/source
	git ls-files -z | tar --null -T - -cf - | tar -xf - -C build/source
	$(RUN) -m pip install --quiet --disable-pip-version-check build
	$(RUN) -m build --outdir dist build/source >build/wheel.log || { cat build/wheel.log; exit 1; }
	@ls dist/*

# The tests come from the sdist, without the package beside them.
test-wheel: wheel  ## the wheel in an environment of its own, outside the checkout
	rm -rf build/wheel && $(PYTHON) -m venv build/wheel/venv
	tar -xzf dist/*.tar.gz -C build/wheel --strip-components 1 && rm -rf build/wheel/lstmjax*
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) "$$(ls dist/*.whl)[all,test]"
	cd build/wheel && LSTMJAX_TEST_DIST=$(CURDIR)/dist LSTMJAX_TEST_CASES=1 venv/bin/python -m pytest $(SPREAD) \
		-m "not alone and not slow" tests/test_package.py tests/test_commands.py tests/test_imports.py \
		tests/test_docs.py tests/test_cells.py tests/test_contract.py tests/test_layers.py $(ARGS)
	build/wheel/venv/bin/lstmjax cumsum --updates 100 --run-dir build/wheel/run

lock: .venv/ready  ## pin what is installed; host names never enter the file
	$(RUN) -m pip install --quiet uv
	.venv/bin/uv pip compile pyproject.toml --extra cpu --extra train --extra imdb --extra test --extra lint \
		--python-version 3.11 --quiet \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements.lock

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lstmjax needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml requirements.lock | .venv/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[cpu,train,imdb]'
	touch $@

.venv/ready-test: .venv/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[cpu,train,imdb,test]'
	touch $@

# By itself: where the compilers are installed, JAX looks for their devices.
.venv-aot/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[train,imdb,test,aot]'
	touch $@

# By itself, and without the package: the reference is made from its sources, JAX need not be there.
.venv-docs/ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch $@

# No pins: whatever is newest. What is pinned in .venv is the lowest JAX that there may be. Of
# llvmlite it is the other way round.
.venv-newest/ready: pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,imdb,test,aot]' 'llvmlite==0.46.*'
	touch $@

.venv/ready-bench: .venv/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[bench]'
	touch $@

.venv/ready-lint: .venv/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[test,lint]'
	touch $@

clean:
	rm -rf .venv .venv-aot .venv-newest .venv-docs build dist *.egg-info
