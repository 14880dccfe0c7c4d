# make demo     the main job, from nothing to its report
# make test     lint, types and tests, as CI runs them
# make test-slurm  sweeps on a real SLURM, which it installs and starts; needs root and apt-get
# make bench    side by side with peers, on the same work; ROW=alignment for one row; minutes to an hour
# make torture  50 short runs killed, stopped and damaged at random, taken up again, compared; a quarter of an hour
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test check test-slurm torture bench clean

demo: $(READY)
	$(BIN)/python train.py

# One thread: small tensors, and ranks and workers that share two cores.
check: test
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-slurm: $(READY)
	$(BIN)/python -m pytest tests/slurm

torture: export OMP_NUM_THREADS = 1
torture: $(READY)
	$(BIN)/python -m benchmarks.torture

bench: export OMP_NUM_THREADS = 1
bench: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m benchmarks.bench $(ROW)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv outputs
