# For a new machine: `make demo` (text), `make demo-images`, `make demo-distill` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := pgm_scale data_prep launchers ops tests
STAMP := $(VENV)/.installed

.PHONY: demo demo-images demo-distill test faults nightly slurm-start slurm-stop parity bench check format clean

demo: $(STAMP)
	$(BIN)/python -m ops.demo

demo-images: $(STAMP)
	$(BIN)/python -m ops.demo_images

demo-distill: $(STAMP)
	$(BIN)/python -m ops.demo_distill

# What runs on a real Slurm comes last, alone on the machine; without Debian's slurm-wlm and munge it is skipped.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --ignore tests/slurm -m "not fault"
	$(BIN)/python -m ops.faults
	$(BIN)/python -m pytest tests/slurm -m "not fault and not nightly"

# Every fault that a run must survive, injected into real processes and files; part of `make test`.
faults: $(STAMP)
	$(BIN)/python -m ops.faults

# What takes too long for every change: more jobs on a real Slurm, then random kills, signals and changes of layout for
# ten minutes (`python -m ops.soak --minutes 120` for longer).
nightly: $(STAMP)
	$(BIN)/python -m pytest tests/slurm -m nightly
	$(BIN)/python -m ops.soak --minutes 10 --out build/soak

# A two-node Slurm on this machine, to try launches on.
slurm-start: $(STAMP)
	$(BIN)/python -m ops.slurm_local start

slurm-stop: $(STAMP)
	$(BIN)/python -m ops.slurm_local stop

# Every parallel layout against one process; writes the tables of the README and ops/bench/parity.json.
parity: $(STAMP)
	$(BIN)/python -m ops.parity

# Speed against the published way and against the machine's peaks; writes ops/bench/results/DEVICE.{md,json}.
bench: $(STAMP)
	$(BIN)/python -m ops.bench --out ops/bench/results

check: $(STAMP)
	$(BIN)/ruff check $(FOLDERS)
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/mypy
	rm -rf build && mkdir -p build/site
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . > build/wheel.log || (cat build/wheel.log; exit 1)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/site build/wheel/*.whl
	cd build/site && ../../$(BIN)/python -P -c "import sys; sys.path.insert(0, '.'); import data_prep.cli, \
	  launchers.cli, pgm_scale.cli, pgm_scale.training.loop as m; assert 'build/site' in m.__file__ or m.__file__[0] == '.', m"

format: $(STAMP)
	$(BIN)/ruff check --fix $(FOLDERS)
	$(BIN)/ruff format $(FOLDERS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info

# Python 3.11 or newer, and the exact versions of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "pgm-scale needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)
