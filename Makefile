# make run    from a bare clone to data/08_reporting/report.html
# make test   the whole test suite
# make drill  faults around the stages, for hours; the table of docs/faults.md
# make fuzz   damaged files and requests, ten minutes for each kind
# All make their own .venv; they need Python 3.11 or newer, make, and the package registry.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export KEDRO_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: run test check drill fuzz clean

run: $(VENV)/installed
	almrr repro
	@echo "The report: data/08_reporting/report.html"
	@echo "To keep these figures: git add dvc.lock data/08_reporting/headline.json && git commit"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist loadgroup

check: $(VENV)/installed
	ruff check .
	ruff format --check .
	mypy
	lint-imports

drill: $(VENV)/installed
	python tests/drills/drill.py --kills 50 --tries 3 --table docs/faults.md

fuzz: $(VENV)/installed
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} pytest tests/fuzz

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v git >/dev/null || { echo "git is needed; install it first."; exit 1; }
	@test -e .git || echo "Note: this is no git repository, which DVC needs; run: git init"
	@git var GIT_COMMITTER_IDENT >/dev/null 2>&1 || echo 'Note: git has no identity, which `dvc exp run` needs; run: git config --global user.name NAME, and the same with user.email'
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	$(BIN)/python -m almrr_pipeline.model.kernels.warm_up
	touch $@

clean:
	rm -rf $(VENV)
