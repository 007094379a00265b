# Set-up goes into .venv; every target does what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/python demo.py

# In the order of the files: groups of few tests, which xdist would leave for the end, are the slow ones.
test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder

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
