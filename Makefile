# The two commands a user needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export KMP_BLOCKTIME ?= 0
TEST_WORKERS ?= 3  # on two cores: half of the time a test of a cluster waits for it
FUZZ ?= 100000
SEED ?= 1

.PHONY: demo test test-slow fuzz lint cluster-up cluster-down clean

demo: $(VENV)/.installed  ## phantoms to report on this machine
	$(VENV)/bin/vhs run demo --out runs/demo

test: $(VENV)/.installed-test  ## every test but the slow ones
	$(VENV)/bin/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist worksteal

test-slow: $(VENV)/.installed-test  ## the rest: each crash window alone, real data end to end
	$(VENV)/bin/python -m pytest -m slow -n 2

fuzz: $(VENV)/.installed-test  ## $(FUZZ) mutated inputs for each reader of what others wrote
	$(VENV)/bin/python tests/fuzz.py --count $(FUZZ) --seed $(SEED)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .

cluster-up:  ## a real SLURM cluster of four nodes on this machine, for tests (as root, with Debian's packages); says how to use it
	slurm/testcluster/cluster up

cluster-down:
	slurm/testcluster/cluster down

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info runs
