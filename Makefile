# The README's two commands are `make demo` and `make test`; everything else is for those who build ckptconv, or convert whole folders.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2

.PHONY: help setup demo test browser lint format bench cases schema convert clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     set up, convert a real DataParallel checkpoint, verify it, show the screen"
	@echo "make test     set up, run all tests"
	@echo "make lint     style, strict types, import floors, rule files and their lock"
	@echo "make bench    timings in pairs, as ratios"
	@echo "make cases    convert reference conversions of other people's making and compare [CASES=folder]"
	@echo "make convert IN=folder OUT=folder RULES=name [ARGS='--target …']   every checkpoint under IN, only what changed"
	@echo "make schema   write schema/rule-v1.schema.json anew"

setup: $(READY)

$(READY): pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt "torch"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable . --requirement requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --no-deps --requirement requirements/models.txt
	@touch $@

demo: $(READY)
	@mkdir -p build/demo
	@$(BIN)/python scripts/make_demo_checkpoint.py build/demo/in.pth
	$(BIN)/ckptconv inspect build/demo/in.pth
	$(BIN)/ckptconv run dataparallel build/demo/in.pth build/demo/out.pth --target timm:resnet18 --force

# The tests of HTML reports look at them in a real browser. Without one they are skipped, and say so; under CI=true they fail.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } || \
	    echo "chromium is not installed: the tests that need a browser will be skipped"

test: $(READY) browser
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/ckptconv check --quiet rules
	$(BIN)/ckptconv test --quiet rules
	$(BIN)/ckptconv rules lock --check --quiet

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python bench/run.py

# Real conversions with proved results. They are not part of the repository: the folder is given, or lies beside the checkout.
CASES ?= ../shared/cases
cases: $(READY)
	$(BIN)/python scripts/cases.py "$(CASES)"

schema: $(READY)
	$(BIN)/ckptconv schema > schema/rule-v1.schema.json

# One make rule per checkpoint, so that -j works, unchanged work is skipped, and one bad file does not stop the rest.
convert: $(READY)
	@test -n "$(IN)" -a -n "$(OUT)" -a -n "$(RULES)" || { echo "want IN=folder OUT=folder RULES=rule" >&2; exit 2; }
	@mkdir -p "$(OUT)"
	@$(BIN)/python scripts/folder_rules.py "$(IN)" "$(OUT)" "$(RULES)" --command "$(abspath $(BIN))/ckptconv" $(if $(FORMAT),--format $(FORMAT)) \
	    --arguments="$(ARGS)" > "$(OUT)/.convert.mk"
	@rm -f "$(OUT)/.failed"; $(MAKE) --no-print-directory --keep-going --file "$(OUT)/.convert.mk" all; code=$$?; \
	    if [ -s "$(OUT)/.failed" ]; then echo "not converted:"; sort "$(OUT)/.failed" | sed 's/^/  /'; fi; \
	    rm -f "$(OUT)/.convert.mk" "$(OUT)/.failed"; exit $$code

clean:
	rm -rf build $(VENV)
