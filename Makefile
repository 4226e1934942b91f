# Gantry: `make run` starts the engine and a first container; `make test` runs all checks;
# `make bench` measures it beside containerd; `make chaos` kills it on purpose.

CARGO ?= cargo

.PHONY: help build run stop test bench chaos check unit clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

build: ## build the release binaries
	@scripts/install-packages build
	@command -v $(CARGO) >/dev/null || { echo "cargo is not here; install Rust from https://rustup.rs" >&2; exit 1; }
	$(CARGO) build --release --locked --workspace --exclude gantry-bench --exclude gantry-chaos --bins

run: build ## start the engine and run a first container
	@scripts/install-packages run
	@scripts/run

stop: ## end what `make run` left running
	@scripts/run stop

check: ## formatting and lints
	@scripts/install-packages build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

test: check ## format, lints, unit, contract and end-to-end tests (as root)
	@scripts/install-packages run test
	@[ "$$(id -u)" = 0 ] || { echo "The tests run containers, which needs root" >&2; exit 1; }
	$(CARGO) build --locked --workspace --bins
	GANTRY_TEST_ALL=1 PATH="$$PATH:/usr/sbin:/sbin" $(CARGO) test --locked --workspace --no-fail-fast

bench: build ## measure gantryd beside containerd, write docs/benchmarks.md; QUICK=1, FILTER=CASE, ROUNDS=N, CONTAINERD=PATH, DOCKERD=PATH
	@scripts/install-packages run bench
	$(CARGO) build --release --locked --package gantry-bench
	PATH="$$PATH:/usr/sbin:/sbin" target/release/gantry-bench $(if $(QUICK),--quick) \
		$(if $(FILTER),--filter $(FILTER)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(CONTAINERD:%=--containerd %) \
		$(DOCKERD:%=--dockerd %)

# In a folder of its own: its programs have failpoints, which no others are to have. A summary line of each of the two.
chaos: ## kill, starve and lie to the engine, and fuzz it; QUICK=1, FILTER=TEXT (or fuzz), SOAK=SECONDS
	@scripts/install-packages build run test chaos
	@[ "$$(id -u)" = 0 ] || { echo "The suite runs containers, which needs root" >&2; exit 1; }
	$(if $(filter fuzz,$(FILTER)),,$(CARGO) build --locked --workspace --exclude gantry-bench --bins \
		--features gantry-sys/failpoints --target-dir target/chaos)
	@failed=0; \
	$(if $(filter fuzz,$(FILTER)),,PATH="$$PATH:/usr/sbin:/sbin" target/chaos/debug/gantry-chaos \
		$(if $(QUICK),--quick) $(if $(FILTER),--filter $(FILTER)) $(if $(SOAK),--soak $(SOAK)) || failed=1;) \
	$(if $(filter-out fuzz,$(FILTER)),,scripts/fuzz all $(if $(QUICK),5,60) || failed=1;) \
	exit $$failed

clean: ## remove what was built, and the data of `make run`
	@[ ! -e .gantry/gantryd.pid ] || scripts/run stop
	rm -rf .gantry
	$(CARGO) clean
