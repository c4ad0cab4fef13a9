# Each target is enough by itself on a machine with Python 3.10 or newer, a C compiler and Rust; run again, it is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' -o -name '*.toml' -o -name '*.tsv')
DOCUMENT := examples/documents/demo.txt
COUNT ?= 1000000
CARD ?= 90

# A stable compiler instruments for libFuzzer as well: these are cargo-fuzz's flags, less the sanitizer (which needs a nightly).
FUZZ_SECONDS ?= 600
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
COVERAGE := --cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares

.PHONY: help demo test lint wheel bench fuzz fuzz-tokenizer emulate soak clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/.installed ## build, install, and let the built-in model continue a long document
	$(BIN)/heedful generate --file $(DOCUMENT) --max-tokens 200 --temperature 0.7 --top-p 0.9 --seed 1

test: $(VENV)/.installed-dev ## cargo test, then pytest
	cargo test --workspace --quiet
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev ## formatting, clippy, ruff and types
	cargo fmt --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(BIN)/maturin ## dist/: a wheel for every CPython from 3.10 on, and an sdist
	$(BIN)/maturin build --release --sdist --out dist

bench: $(VENV)/.installed-dev ## the side-by-side benchmarks
	for bench in benches/bench_*.py; do $(BIN)/python $$bench || exit 1; done

fuzz: ## coverage-guided fuzzing of the tokenizer in Rust, FUZZ_SECONDS a target; needs a C++ compiler
	RUSTFLAGS="$(COVERAGE)" cargo build --release --manifest-path rust/fuzz/Cargo.toml --target $(HOST) --target-dir target/fuzz
	cd rust/fuzz && for target in tokenizer_file tokenizer_text; do \
		mkdir -p corpus/$$target artifacts && ../../target/fuzz/$(HOST)/release/$$target corpus/$$target seeds/$$target \
			-max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=10 -rss_limit_mb=1024 -artifact_prefix=artifacts/ \
			-print_final_stats=1 || exit 1; done

fuzz-tokenizer: $(VENV)/.installed-dev ## COUNT drawn strings a file against the reference tokenizers
	$(BIN)/python tests/fuzz_tokenizer.py --count $(COUNT)

emulate: $(VENV)/.installed-dev ## the kernels' tests with every example, compiled for CARD (80, 90, 120), in the emulator
	EMULATE=$(CARD) $(BIN)/python -m pytest tests/emulated tests/kernels

soak: $(VENV)/.installed-dev ## COUNT random calls to the scheduler against its model
	$(BIN)/python tests/soak_scheduler.py --operations $(COUNT)

clean: ## remove everything that was built here
	rm -rf $(VENV) target dist
	find python -name '*.so' -delete

$(BIN)/maturin:
	@command -v cargo >/dev/null || { echo "Rust is needed: no cargo on PATH" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'maturin>=1.9,<2'

$(VENV)/.installed: $(BIN)/maturin $(RUST)
	$(BIN)/maturin develop --release --extras torch
	touch $@

# The extra `dev` names heedful itself, which must be there first; with the extra `torch` its newest release would come, only to
# make room for the one that `dev` wants.
$(VENV)/.installed-dev: $(BIN)/maturin $(RUST)
	$(BIN)/maturin develop --release
	$(BIN)/maturin develop --release --extras dev
	touch $(VENV)/.installed $@
