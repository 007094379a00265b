# Set-up goes into .venv; every target does what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/python demo.py

test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

# The type checker reads the packages where the build puts them, under their imported names.
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed
	$(BIN)/python -c "import setuptools; setuptools.setup()" -q build_py --build-lib build/typed
	MYPYPATH=build/typed $(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,test,lint]'
	touch $@

clean:
	rm -rf .venv build
