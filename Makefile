# Gantry: `make run` starts the engine and a first container; `make test` runs all checks.

CARGO ?= cargo

.PHONY: help build run stop test check unit clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

build: ## build the release binaries
	@scripts/install-packages build
	@command -v $(CARGO) >/dev/null || { echo "cargo is not here; install Rust from https://rustup.rs" >&2; exit 1; }
	$(CARGO) build --release --locked --workspace --bins

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
	GANTRY_TEST_ALL=1 PATH="$$PATH:/usr/sbin:/sbin" $(CARGO) test --locked --workspace

clean: ## remove what was built, and the data of `make run`
	@[ ! -e .gantry/gantryd.pid ] || scripts/run stop
	rm -rf .gantry
	$(CARGO) clean
