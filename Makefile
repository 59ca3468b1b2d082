# make train   sets up .venv if it is missing, then trains the demo (runs/demo)
# make test    sets up .venv if it is missing, then runs the tests: all but the long ones
#
# make test-faults    every fault that is injected, the long ones too, and a short soak
# make test-nightly   the long tests, those of SLURM among them, which apt-get install slurmctld slurmd munge makes possible

PYTHON ?= python3
BIN := .venv/bin
# On a machine without an NVIDIA driver the CPU build of torch serves; with one, the default index brings the CUDA build.
CPU_TORCH := $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup train test test-faults test-nightly clean

setup: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "proteingpt needs Python >= 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --retries 1 --no-deps -c constraints.txt $(CPU_TORCH) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

train: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/train.py --ds_config ds_configs/zero2.json --output runs/demo

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/unit tests/numerics tests/real -n 2 --dist loadfile -m "not nightly"
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/integration tests/faults -m "not nightly"

test-faults: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/faults
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m benchmarks.soak --minutes 1 --every 8

test-nightly: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests -m nightly

clean:
	rm -rf runs shards/demo build *.egg-info
