# make demo    two machines ping each other
# make test    every test; guests run in the carrier where KVM cannot be used
# make conformance  the NixOS test driver's API, case by case, and the table in tests/conformance/README.md
# make lint    formatting, clippy, mypy, ruff, nixfmt
# make bench   firn beside what is installed of QEMU, Firecracker, cloud-hypervisor, virtiofsd and vde2: boots, 1 to 16
#              machines, store, networks, disk, memory, commands; what checkpoints cost. About an hour. Results go to
#              tests/bench/results; AGAINST=DIR says what has changed since those there
# make fuzz    a million hostile inputs for each fuzz target; RUNS=N for another number
# make clean   removes what was built here; kits stay in ~/.cache/firn

SHELL := /bin/bash -o pipefail
TARGET := x86_64-unknown-linux-gnu
VENV := .venv/bin
FIRN := $(VENV)/firn
NIX := $(wildcard flake.nix nix/*.nix nix/*/*.nix tests/nix/*.nix)
# Test binaries run through this: directly with KVM, else in one carrier each.
RUN_IN = FIRN_AGENT="$(abspath $(VENV)/firn-agent)" \
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(abspath $(FIRN)) carrier exec $(1) --"

# Tests that cannot run here list themselves there.
SKIPPED := $(abspath target/skipped)

RUNS = 1000000

# What pip installs has these versions, whoever calls it.
export PIP_CONSTRAINT := $(abspath tests/tools.txt)

.PHONY: fuzz demo test guests-a guests-b conformance lint bench clean build setup setup-tests kit

# The test has its guest made if it is not there.
demo: build
	$(FIRN) test tests/examples/ping/test.toml

test: export FIRN_SKIPPED = $(SKIPPED)/list
test: setup-tests kit
	rm -rf $(SKIPPED)
	mkdir -p $(SKIPPED)
	tests/nix/evaluate.py
	cargo test --release --workspace --exclude firn-tests
	$(VENV)/pip install -q mypy pexpect pytest-xdist selenium
	$(VENV)/python -m unittest discover -s driver/python/tests -t driver/python
	$(VENV)/python tests/conformance/conformance.py run --quick
	$(FIRN) test tests/examples/database/test.toml
	FIRN_AGENT="$(abspath $(VENV)/firn-agent)" cargo test --release -p firn-tests --test host
	cargo test --release -p firn-tests --no-run
	$(MAKE) -j2 guests-a guests-b
	@touch $$FIRN_SKIPPED; echo "skipped tests: $$(wc -l <$$FIRN_SKIPPED)"; cat $$FIRN_SKIPPED

# Guests run one after the other, in two carriers at a time: these modules in one, all others in the other.
HALF := balloon:: boot:: command:: devices:: disks:: files:: network:: power:: typing::
GUESTS = $(call RUN_IN,--if-needed --writable $(SKIPPED)) cargo test --release -p firn-tests

guests-a:
	$(GUESTS) --test guest -- --test-threads=1 $(HALF) 2>&1 | sed -u 's/^/a: /'

guests-b:
	$(GUESTS) --test ping --test guest -- --test-threads=1 $(addprefix --skip ,$(HALF)) 2>&1 | sed -u 's/^/b: /'

conformance: setup-tests kit
	$(VENV)/python tests/conformance/conformance.py run --write

fuzz: setup
	BOLERO_RANDOM_ITERATIONS=$(RUNS) cargo test --release -p firn-fuzz

# cargo runs it in tests/, where a carrier may write; what fails does not keep the rest from being measured.
bench: RESULTS := --output $(abspath tests/bench/results) $(if $(AGAINST),--against $(abspath $(AGAINST)))
bench: OTHERS := --compare qemu-q35,qemu-microvm,firecracker,cloud-hypervisor
bench: kit
	@.ci/setup bench
	@failed=0; \
	set -x; \
	$(FIRN) bench boot --runs 3 $(OTHERS) $(RESULTS) || failed=1; \
	$(FIRN) bench boot --runs 2 --machines 2,4,8,16 --compare qemu-microvm $(RESULTS) || failed=1; \
	$(call RUN_IN,--if-needed) cargo bench -p firn-tests --bench guest -- --rounds 2 $(RESULTS) || failed=1; \
	$(call RUN_IN,--exact) cargo bench -p firn-tests --bench checkpoint || failed=1; \
	exit $$failed

lint: setup-tests build
	cargo fmt --all --check
	python3 tests/conformance/conformance.py table --check
	python3 tests/links.py
	python3 tests/dependencies.py
	# Only vmm/src/arch knows a processor: its registers, ports, tables and image formats.
	! grep -rnwE 'x86(_64)?|IOAPIC|LAPIC|irqchip|gsi|GSI|COM1|cpuid|msrs?|acpi|smbios|e820|setup_header|zero_page' \
		vmm/src --include='*.rs' --exclude-dir=arch
	! grep -rnwE '(kvm|get|set)_s?regs|rflags|rip|rdtsc|tsc_khz|triple fault' \
		vmm/src --include='*.rs' --exclude-dir=arch
	cargo clippy --release --workspace --all-targets -- -D warnings
	$(VENV)/pip install -q mypy pytest ruff selenium types-pexpect
	$(VENV)/mypy --config-file driver/pyproject.toml driver/python
	# The stub says what the extension module is, which has to be there.
	cd driver && ../$(VENV)/stubtest firn._firn --mypy-config-file pyproject.toml --ignore-disjoint-bases \
		--allowlist stubtest.allow
	$(VENV)/ruff check --config driver/pyproject.toml driver/python tests
	$(VENV)/ruff format --check --config driver/pyproject.toml driver/python tests
	# Nothing is built: no store is needed.
	NIX_REMOTE=dummy:// nix-instantiate --parse $(NIX) >/dev/null
	cargo install --quiet --locked --debug --root target/nixfmt nixfmt_rs@0.5.3
	target/nixfmt/bin/nixfmt --check $(NIX)

kit: build
	$(FIRN) kit build micro
	$(FIRN) kit build systemd
	$(FIRN) kit build desktop

build: setup $(VENV)/python
	RUSTFLAGS="-C target-feature=+crt-static" \
		cargo build --profile agent -p firn-guest-agent --target $(TARGET)
	cargo build --release -p firn-cli
	PIP_QUIET=1 VIRTUAL_ENV="$(abspath .venv)" $(VENV)/maturin develop --quiet --release \
		--extras interactive,check -m driver/python/Cargo.toml
	# Otherwise each run where nothing can be written there, as in a carrier, compiles it anew.
	$(VENV)/python -m compileall -q driver/python/firn driver/python/test_driver
	install -C target/$(TARGET)/agent/firn-agent target/release/firn $(VENV)/

setup:
	@.ci/setup

setup-tests:
	@.ci/setup tests

$(VENV)/python:
	python3 -m venv .venv
	$(VENV)/pip install -q maturin

clean:
	cargo clean
	rm -rf .venv driver/python/firn/_firn.*.so
