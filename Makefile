# make demo: a small Dynamic Group Transformer learns handwritten digits, with pictures.
# make test: the test suite.
# make test-slow: its slow tests, which repeat quicker ones for other models, tasks and devices.
# make test-aot: compiles for GPUs and TPUs that are not there (an hour, and 4 GB of packages).
# make test-accelerator: compares the GPU or TPU that is there with the CPU (minutes); the first time
#   with EXTRA=cuda or EXTRA=tpu, which installs jax for it. ACCELERATOR=cpu tries the tests on a CPU.
# make stress: kills, signals, damaged files and random input, by the thousand, and large models (hours).
# make docs: the documentation as a site, docs/_build/index.html.
# make tutorial: runs docs/tutorial.ipynb (jupyter-execute --inplace also stores its outputs).
# All of them first create .venv with the pinned versions.

PYTHON ?= python3
RUN ?= runs/demo
INSTALL = PIP_CONSTRAINT=constraints.txt .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-accelerator test-aot stress lint docs tutorial clean

demo: .venv/installed
	.venv/bin/python -m experiments.dgt.demo $(RUN)

test: .venv/installed
	.venv/bin/python -m pytest -n auto --dist loadfile

test-slow: .venv/installed
	.venv/bin/python -m pytest -m slow -n auto --dist loadfile

ACCELERATOR ?= found
test-accelerator: .venv/installed
ifdef EXTRA
	$(INSTALL) -e '.[test,$(EXTRA)]'
endif
	TOKENVIT_JAX_TEST_ACCELERATOR=$(ACCELERATOR) \
		.venv/bin/python -m pytest tests/accelerator -m accelerator -rs --continue-on-collection-errors

test-aot: .venv/aot/installed
	.venv/aot/bin/python -m pytest tests/aot -m aot -rs

stress: .venv/installed
	.venv/bin/python -m pytest tests -m stress -rs

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Removes the old pages first: otherwise the pages of deleted modules would stay.
docs: .venv/docs
	rm -rf docs/api docs/_build docs/jupyter_execute
	JAX_PLATFORMS=cpu .venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . docs/_build

tutorial: .venv/docs
	JAX_PLATFORMS=cpu .venv/bin/jupyter-execute docs/tutorial.ipynb

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard tokenvit_jax/data/*.c)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[test]'
	touch $@

# An environment of its own: elsewhere, JAX would look for the devices of the installed compilers.
.venv/aot/installed: .venv/installed
	.venv/bin/python -m venv .venv/aot
	PIP_CONSTRAINT=constraints.txt .venv/aot/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[test,aot-gpu,aot-tpu]'
	touch $@

.venv/docs: .venv/installed
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf .venv docs/api docs/_build
