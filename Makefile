# make up      a four-node cluster on this machine that serves a model
# make test    lint, unit tests, filters in real Jinja, molecule with testinfra on a lab of its own
# make down    take the lab away       make distclean   take the caches, too
SHELL := /bin/bash
.DELETE_ON_ERROR:

export GLEANER_CACHE ?= /var/cache/gleaner
export GLEANER_LAB_ID ?= 0
# The tests have a lab of their own, so that they leave the one of `make up` alone.
TEST_LAB_ID ?= 1
export ANSIBLE_FORCE_COLOR ?= $(if $(MAKE_TERMOUT),1,)

BIN := .venv/bin
VAULT := inventories/lab/group_vars/all/vault.yml
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Asks for the password once where sudo wants one.
BECOME = $(if $(SUDO),$(shell sudo -n true 2>/dev/null || echo --ask-become-pass),)
PLAYBOOK = $(BIN)/ansible-playbook $(BECOME)
# For programs that take their lab down: each has an id of its own, and leaves the lab of `make up` alone.
OWN_LAB := env --unset=GLEANER_LAB_ID
STAYS := the packages apt-cacher-ng, mmdebstrap, systemd-container, iproute2, debian-archive-keyring and openssh-client

.PHONY: help up down distclean sources test lint unit lab-tests bench bench-preemption fuzz test-cuda
.PHONY: bench-provisioning
.PHONY: test-tailnet test-full full-machine full-lab full-older full-existing full-platforms full-interrupted
.PHONY: full-tailnet full-day-two full-cuda full-timed

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

up: .venv/ready $(VAULT) sources
	$(PLAYBOOK) playbooks/lab_up.yml
	$(PLAYBOOK) site.yml
	@$(BIN)/python tools/first_completion.py --lab $(GLEANER_LAB_ID)

down: .venv/ready
	$(PLAYBOOK) playbooks/lab_down.yml
	@echo "The lab is gone. What stays: $(STAYS),"
	@echo "and the caches in $(GLEANER_CACHE) (make distclean takes these)."

distclean: .venv/ready
	$(PLAYBOOK) playbooks/lab_distclean.yml
	rm -rf .venv .lab .ansible .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VAULT)
	@echo "The lab and its caches are gone. What stays: $(STAYS)."

sources: .venv/ready
	@$(SUDO) install -d -o "$$(id -u)" $(GLEANER_CACHE) $(GLEANER_CACHE)/sources
	@$(BIN)/python tools/fetch_lab_sources.py $(GLEANER_CACHE)/sources

test: lint unit lab-tests

lint: .venv/ready $(VAULT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck $$(git grep -lE '^#!/bin/(ba)?sh' -- ':!*.j2')
	$(BIN)/ansible-lint

unit: .venv/ready
	$(BIN)/python -m pytest -q -n 2 tests/unit tests/filters tests/render tests/docs

lab-tests: .venv/ready $(VAULT) sources
	GLEANER_LAB_ID=$(TEST_LAB_ID) tools/lab_tests

# The planner's benchmark runs beside a lab of its own (tools/with_lab), since it submits jobs; that of the split, too,
# since the tiers are away meanwhile.
bench: .venv/ready $(VAULT) sources
	$(BIN)/python -m benchmarks.gateway
	$(OWN_LAB) $(BIN)/python -m benchmarks.bring_up
	GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab $(BIN)/python -m benchmarks.split

# How site.yml grows from four hosts to sixteen: the better part of an hour.
bench-provisioning: .venv/ready $(VAULT) sources
	$(OWN_LAB) $(BIN)/python -m benchmarks.provisioning

# What paying jobs wait because of the tiers, into docs/preemption.md: with both versions of Slurm, an hour each.
bench-preemption: .venv/ready $(VAULT) sources
	GLEANER_LAB_ID=5 GLEANER_LAB_SUITE=trixie PYTHONPATH=src tools/with_lab $(BIN)/python -m benchmarks.preemption
	GLEANER_LAB_ID=5 GLEANER_LAB_SUITE=bookworm PYTHONPATH=src tools/with_lab $(BIN)/python -m benchmarks.preemption

# The production engine, CUDA for SM70, built and looked into: a quarter of an hour on two processors, minutes from the
# compiler cache. Writes docs/cuda-proof.json.
test-cuda: .venv/ready $(VAULT) sources
	GLEANER_LAB_ID=6 tools/with_lab --bare tools/cuda_proof

# The way in from a tailnet: tailscale and headscale, built from their pinned sources once (some four minutes on two
# processors), on a lab with two more hosts. Reported as skipped where this machine has no Go, or no way to its modules.
test-tailnet: .venv/ready $(VAULT) sources
	@$(SUDO) install -d -o "$$(id -u)" $(GLEANER_CACHE) $(GLEANER_CACHE)/tailnet
	@code=0; $(BIN)/python tools/tailnet_programs.py $(GLEANER_CACHE)/tailnet || code=$$?; \
	case $$code in \
	0) GLEANER_LAB_ID=4 PYTHONPATH=src tools/with_lab $(BIN)/python -m pytest -v molecule/tailnet;; \
	3) echo "SKIPPED: the scenario tailnet, for the reason above";; \
	*) exit $$code;; \
	esac

# A search for GGUF headers that break what is claimed of all, written into docs/fuzzing.md.
SECONDS ?= 600
fuzz: .venv/fuzz
	@$(SUDO) install -d -o "$$(id -u)" $(GLEANER_CACHE) $(GLEANER_CACHE)/fuzz
	PYTHONPATH=src nice $(BIN)/python -m tests.fuzz.gguf_header --record \
		--seconds $(SECONDS) --corpus $(GLEANER_CACHE)/fuzz/gguf_header

# What is longer than make test; docs/test-full.md lists it. Its parts have labs of their own, so that with -j2 they run
# beside one another; what is timed runs alone, at the end.
test-full: full-timed

full-machine: .venv/ready $(VAULT) sources
	$(SUDO) tools/fresh_machine
	$(OWN_LAB) $(BIN)/python -m pytest -v tests/full/test_*.py

full-lab: full-machine
	GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab $(BIN)/python -m pytest -v tests/full/lab
	GLEANER_LAB_ID=9 PYTHONPATH=src tools/with_lab $(BIN)/python -m benchmarks.sizing

# The same promises with the older Slurm, of Debian 12, which completes a job that leaves during a preemption.
full-older: full-lab
	GLEANER_LAB_ID=5 GLEANER_LAB_SUITE=bookworm PYTHONPATH=src tools/with_lab $(BIN)/python -m pytest -v \
		tests/full/platforms/test_main_scenario.py molecule/preemption tests/full/lab/test_preemption_faults.py

# On a Slurm that was there before, with both of its versions.
full-existing: full-older
	GLEANER_LAB_ID=5 GLEANER_LAB_SUITE=trixie PYTHONPATH=src tools/with_lab --bare $(BIN)/python -m pytest -v \
		tests/full/existing
	GLEANER_LAB_ID=5 GLEANER_LAB_SUITE=bookworm PYTHONPATH=src tools/with_lab --bare $(BIN)/python -m pytest -v \
		tests/full/existing

# The newest ansible-core, on a host of the lab, and the oldest, here.
full-platforms: full-existing
	GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab --bare $(BIN)/python -m pytest -x -v -s \
		tests/full/platforms/test_control_machines.py

# Ten kills, ten repairs.
full-interrupted: full-platforms
	GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab --bare $(BIN)/python -m pytest -x -v -s \
		tests/full/day_two/test_interrupted.py

full-tailnet: full-interrupted
	$(MAKE) test-tailnet

# What an administrator does after the first day: machines are replaced, come, go and are killed in between.
full-day-two: full-tailnet
	GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab $(BIN)/python -m pytest -v molecule/replace_node tests/full/day_two \
		--ignore=tests/full/day_two/test_interrupted.py

full-cuda: full-day-two
	$(MAKE) test-cuda

full-timed: test full-cuda
	$(OWN_LAB) $(BIN)/python -m benchmarks.bring_up --rounds 1 --make-up

.venv/ready: requirements.txt constraints.txt tools/bootstrap
	tools/bootstrap .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/fuzz: .venv/ready tests/fuzz/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/fuzz/requirements.txt
	touch $@

$(VAULT): .venv/ready tools/lab_secrets.py
	@$(BIN)/python tools/lab_secrets.py $@
