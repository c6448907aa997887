# SPDX-License-Identifier: Apache-2.0
#
# Plain `make` prints help, made from the comments after ## and the headings after ##@.

VENV ?= .venv
OUT ?= build/run
ARGS ?=
# Of `make run`: a line for the guest's shell, a target, sources. Exported, so that no shell on the
# host reads a word of them.
CMD ?=
TARGET ?=
SOURCE ?=
export CMD TARGET SOURCE
COVERED = $(if $(TARGET),--target "$$TARGET") $(if $(SOURCE),--source "$$SOURCE")
COMMAND = $(if $(CMD),-- sh -c "$$CMD")
# Of `make check-guest`: what pytest runs.
TESTS ?= examples/test_key_value.py
PYTHON ?=
export PYTHON
# Tests start Python a thousand times; each would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

# The Pythons that `make test-all` looks for, on PATH and among pyenv's.
PYTHONS ?= 3.11 3.12 3.13

# How pytest runs tests side by side: whole files; tests/conftest.py says how many at a time.
# `make test ARGS=-n0` runs one after the other; so does --pdb.
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

# Mutations of `make storm`, calls of `make answers`.
STORM ?= 10000000
ANSWERS ?= 10000000

# The checkout of syzkaller for `make syzkaller-check`, built by you.
SYZKALLER ?=
export SYZKALLER

# The Debian release of `make test-on`.
RELEASE ?=

# What packages are for: building images takes one more where this is not root.
KINDS := run $(if $(filter 0,$(shell id -u)),,user)

# What ruff formats.
SOURCES := bridge tests examples docs setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help run check-guest image native-targets qemu-devices bench test test-unit test-all test-on storm answers executor kills fuzz-kills fuzz-workers syzkaller-kills syzkaller-check conformance reference lint docs screenshots dist format venv packages packages-test clean distclean

help: ## print this help
	@awk -F ' ## ' '/^##@/ { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.* ## / { split($$1, name, ":"); printf "make %-12s %s\n", name[1], $$2 }' \
		$(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'Variables: OUT=$(OUT) (where `make run` puts its results), CMD="..." TARGET=... SOURCE=...'
	@echo '(what it runs, and what it covers), TESTS="..." (of check-guest), ARGS="..." (more arguments'
	@echo 'for run or for pytest), VENV=$(VENV), PYTHON=PROGRAM. Examples:'
	@echo "  make run CMD='ls -lR /mnt/target | wc -l' SOURCE=python"
	@echo '  make run ARGS="--memory 512 -- ls -l /mnt/target"'
	@echo '  make test ARGS="-k config"'
	@echo '  make test-on RELEASE=trixie STEPS=run   (STEPS="run test" if not said; ARGS for the tests)'
	@echo '  make conformance ARGS="--kernel debug"   (with lockdep, KASAN, ...; built as by reference)'

##@ Use

run: packages $(VENV)/installed ## install what is missing, boot a guest and run the default workload under kcov
	$(VENV)/bin/kcov-bridge run --out $(OUT) $(strip $(COVERED) $(ARGS) $(COMMAND))

image: packages $(VENV)/installed ## build the default guest image
	$(VENV)/bin/kcov-bridge image build $(ARGS)

native-targets: packages $(VENV)/installed ## build the programs of all native targets, with coverage
	$(VENV)/bin/kcov-bridge target build --all $(ARGS)

qemu-devices: packages $(VENV)/installed ## build a QEMU whose own device models are covered (half an hour)
	$(VENV)/bin/python -m bridge.vm.device_models

bench: packages-test $(VENV)/installed-bench ## measure what the bridge costs; needs a quiet machine and minutes: build/bench.json
	@mkdir -p build
	-@.ci/install-packages bench
	$(VENV)/bin/kcov-bridge bench -o build/bench.json --plot build/bench.svg $(ARGS)

##@ Test

test: packages-test $(VENV)/installed-dev ## run all tests; boots virtual machines (many minutes without KVM)
	@mkdir -p build
	@status=0; $(VENV)/bin/python -m pytest $(WORKERS) $(ARGS) || status=$$?; \
		echo $$status >build/test.status; exit $$status

check-guest: packages-test $(VENV)/installed-dev ## run the tests that take a guest from TESTS, without any skip for a missing QEMU
	KCOV_BRIDGE_REQUIRE=1 $(VENV)/bin/python -m pytest -m guest $(TESTS) $(ARGS)

test-unit: packages-test $(VENV)/installed-dev ## run the tests that need no virtual machine (a minute or two)
	$(VENV)/bin/python -m pytest -m 'not vm and not bench' $(ARGS)

executor: packages-test $(VENV)/installed-dev ## run a client like a fuzzer's for 100,000 system calls
	KCOV_BRIDGE_EXECUTOR=100000 $(VENV)/bin/python -m pytest tests/system/test_executor.py -k an_executor $(ARGS)

kills: packages-test $(VENV)/installed-dev ## kill 200 runs at random moments and check that nothing is left
	KCOV_BRIDGE_KILLS=200 $(VENV)/bin/python -m pytest tests/cli/test_kills.py $(ARGS)

fuzz-kills: packages-test $(VENV)/installed-dev ## kill each of two campaigns 50 times, and compare what they announced
	KCOV_BRIDGE_FUZZ_KILLS=50 $(VENV)/bin/python -m pytest -s tests/fuzz/campaign_kills.py $(ARGS)

fuzz-workers: packages-test $(VENV)/installed-dev ## kill workers in network namespaces for 5 minutes (as root)
	$(VENV)/bin/python -m pytest -s tests/fuzz/campaign_workers.py $(ARGS)

syzkaller-kills: packages-test $(VENV)/installed-dev ## kill what syzkaller's manager starts 15 times, and let guests break themselves
	$(VENV)/bin/python -m pytest -s tests/cli/syzkaller_kills.py $(ARGS)

syzkaller-check: packages-test $(VENV)/installed-dev ## run your own syz-manager of SYZKALLER=directory for some minutes, and check its pages
	$(VENV)/bin/python -m pytest -s tests/cli/syzkaller_manager.py $(ARGS)

test-all: packages-test ## run test-unit on each Python of PYTHONS that is found
	@found=; for version in $(PYTHONS); do \
		for python in "$$(command -v python$$version)" "$$HOME"/.pyenv/versions/$$version.*/bin/python; do \
			"$$python" -c '' 2>/dev/null || continue; \
			found="$$found $$version"; \
			echo "== $$python"; \
			PYTHON="$$python" .ci/make-venv build/venv-$$version dev || exit; \
			build/venv-$$version/bin/python -m pytest -m 'not vm and not bench' $(ARGS) || exit; \
			break; \
		done; \
	done; \
	[ -n "$$found" ] || { echo "none of Python $(PYTHONS) is here"; exit 2; }; \
	echo "passed on Python$$found"

test-on: ## run "make run" and the tests in a clean root of RELEASE=trixie, or another; needs root
	@.ci/test-on $(RELEASE)

storm: packages-test $(VENV)/installed-dev ## let a hostile guest scribble over the region ten million times (minutes)
	KCOV_BRIDGE_STORM=$(STORM) $(VENV)/bin/python -m pytest -s tests/system/test_storm.py $(ARGS)

answers: packages-test $(VENV)/installed-dev ## check ten million times that a call finds its own PCs (minutes)
	KCOV_BRIDGE_ANSWERS=$(ANSWERS) $(VENV)/bin/python -m pytest -s tests/system/test_answers.py $(ARGS)

conformance: packages-test $(VENV)/installed-dev ## check kcov's rules in guests: linux and gvisor, on 1 and 4 vCPUs
	$(VENV)/bin/python -m tests.system.conformance $(ARGS)

reference: packages-test $(VENV)/installed-dev ## check the same rules on a kernel built with kcov (many minutes)
	$(VENV)/bin/python -m tests.system.conformance --reference $(ARGS)

##@ Develop

lint: $(VENV)/installed-dev ## run the linters
	$(VENV)/bin/python -m pytest -q tests/test_lint.py

docs: $(VENV)/installed-dev ## build the API reference into build/docs
	$(VENV)/bin/python docs/api.py build/docs
	@echo "open build/docs/index.html"

# A run of tests, a run with a trace and a campaign, and the pictures of their reports. A campaign
# that found something ends with status 1.
PICTURED := ls -lR /mnt/target; cp -r /mnt/target /tmp/copy; diff -r /mnt/target /tmp/copy
screenshots: packages-test $(VENV)/installed-dev ## make the pictures of docs/report.md and docs/fuzzing.md from runs in guests
	rm -rf build/screenshots
	mkdir -p build/screenshots
	KCOV_BRIDGE_REQUIRE=1 PYTHONPATH=examples/power_supply/src $(VENV)/bin/python -m pytest -m guest \
		examples/power_supply/tests/guest examples/test_key_value.py --guest-report=build/screenshots/tests
	$(VENV)/bin/kcov-bridge run --source python,kernel --out build/screenshots/run \
		--trace=build/screenshots/trace.txt -- sh -c "$(PICTURED)"
	$(VENV)/bin/kcov-bridge fuzz --out build/screenshots/campaign --time 5m || [ $$? -eq 1 ]
	$(VENV)/bin/python -m docs.screenshots build/screenshots/tests build/screenshots/run \
		build/screenshots/campaign

dist: $(VENV)/installed-dev ## build the wheel and the source distribution into dist/
	$(VENV)/bin/python -m build

format: $(VENV)/installed-dev ## format the Python sources
	$(VENV)/bin/ruff check --fix --quiet $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

venv: $(VENV)/installed-dev ## make .venv with all that development needs

packages:
	@.ci/install-packages $(KINDS)

packages-test:
	@.ci/install-packages $(KINDS) test

# Stamps: a second `make run` asks neither apt nor pip.
COMPILED := bridge/device/fastpath/compiled.pyx bridge/sources/python/tracer/compiled.pyx

$(VENV)/installed: pyproject.toml .ci/make-venv $(COMPILED)
	.ci/make-venv $(VENV)
	@touch $@

$(VENV)/installed-dev: pyproject.toml .ci/make-venv $(COMPILED)
	.ci/make-venv $(VENV) dev
	@touch $(VENV)/installed $@

$(VENV)/installed-bench: pyproject.toml .ci/make-venv $(COMPILED)
	.ci/make-venv $(VENV) bench
	@touch $(VENV)/installed $@

clean: ## remove what was built here; images in the cache stay (kcov-bridge image rm --all)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bridge tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the virtual environment
	rm -rf $(VENV) *.egg-info
