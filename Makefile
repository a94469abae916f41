# The verbs of this project; `make help` lists them. Everything that they install goes into .venv.
#
# PYTHON       the Python that .venv is made from
# DEMO_ARGS    passed to `vfiomig demo`, as in make demo DEMO_ARGS='--size 1G', or demo-qemu
# PYTEST_ARGS  passed to pytest, as in make test PYTEST_ARGS='-k draw'
# BENCH_ARGS   passed to bench/run.py
# LOCK_ARGS    passed to tools/lock.sh, as in make lock LOCK_ARGS=--upgrade

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two verbs side by side would run two pips in one .venv.
.NOTPARALLEL:
.PHONY: help setup setup-dev demo demo-qemu test test-qemu test-kernel test-all check bench docs
.PHONY: dist lock clean distclean platform compiler browser guests fetched

PYTHON ?= python3
export PYTHON
RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)
FAST := tests/unit tests/property tests/seccomp tests/vfio_user

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

setup: .venv/.installed-run ## install what running needs
	@echo "ready: .venv/bin/vfiomig --help"

setup-dev: .venv/.installed-dev ## install what working on the project needs
	@echo "ready: make check test"

demo: platform .venv/.installed-run ## migrate one virtual device into another and compare them
	@.venv/bin/vfiomig demo $(DEMO_ARGS)

demo-qemu: platform .venv/.installed-run fetched ## the same with a guest and its devices, between two QEMUs
	@.venv/bin/vfiomig demo --qemu $(DEMO_ARGS)

test: platform compiler .venv/.installed-test ## run the tests that need nothing but this machine
	@$(PYTEST) $(FAST)

test-qemu: platform compiler guests ## run the tests with guests under QEMU, which is fetched
	@$(PYTEST) tests/qemu

test-kernel: platform compiler guests ## run the tests with a driver of a kernel, in guests that are fetched
	@$(PYTEST) tests/guest

# One run of pytest, so that its summary is about everything.
test-all: platform compiler browser guests ## run every test that this machine can run
	@$(PYTEST) $(FAST) tests/browser tests/qemu tests/guest

docs: .venv/.installed-run ## write the pages that are made from tables
	@$(RUN) -m vfiomig.checks.document docs/checks.md
	@$(RUN) -m vfiomig.models.document docs/devices.md

check: .venv/.installed-dev ## lint, formatting and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: platform compiler .venv/.installed-test ## measure, always against something else in the same run
	@$(RUN) bench/run.py $(BENCH_ARGS)

dist: .venv/.installed-build ## build a wheel and a source package into dist/
	@$(RUN) -m hatchling build

lock: .venv/.installed-lock ## write requirements/ anew after a change of pyproject.toml
	@sh tools/lock.sh $(LOCK_ARGS)

clean: ## remove what building and testing left
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage bench/results
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf .venv

# Before the tests, which have a deadline each. Nothing is done when all is there.
guests: .venv/.installed-test
	@$(RUN) -m vmtest fetch >/dev/null

fetched:
	@$(RUN) -m vmtest fetch --demo >/dev/null

platform compiler browser:
	@sh tools/prerequisites.sh $@

# What a lock contains of the others; installing it makes installing them unnecessary.
contained-in-test := build run
contained-in-dev := test build run

.venv/.installed-%: requirements/%.txt pyproject.toml tools/environment.sh
	@sh tools/environment.sh $<
	@touch $@ $(contained-in-$*:%=.venv/.installed-%)
