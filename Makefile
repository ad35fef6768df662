# make demo: stock and converted EfficientNet-B0 side by side on a real photograph
# make test: every check that this machine can run; ARGS=--exhaustive for large models and every GPU
#            architecture too
# Both set up .venv and build the extension first. PYTHON chooses the interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*) setup.py pyproject.toml

.PHONY: demo test lint format clean

demo: $(VENV)/built
	$(BIN)/python benchmarks/demo.py $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

lint: $(VENV)/built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')
	$(BIN)/python -m mypy

format: $(VENV)/built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')

# Torch first: the extension builds against the installed one, without build isolation.
$(VENV)/torch: .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[timm,effnet,bench,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info effnet_kernels/*.so
