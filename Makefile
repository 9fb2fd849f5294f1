# make demo: a small Dynamic Group Transformer learns handwritten digits, with pictures.
# make test: the test suite.
# Both first make .venv with every pinned version.

PYTHON ?= python3
RUN ?= runs/demo

.PHONY: demo test lint clean

demo: .venv/installed
	.venv/bin/python -m experiments.dgt.demo $(RUN)

test: .venv/installed
	.venv/bin/python -m pytest -n auto --dist loadfile

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf .venv
