# The README's two commands are `make demo` and `make test`; everything else is for those who build ckptconv, or convert whole folders.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2
SECONDS ?= 600
SEED    ?= 0

# Compiled modules are kept, whatever the shell says: the tests start Python by the hundred.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test torture strikes fuzz lint format bench cases schema convert clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     set up, convert a real DataParallel checkpoint, verify it, show the screen"
	@echo "make test     set up, run all tests"
	@echo "make torture  every fault of the output tests, then faults at random [SECONDS=600]"
	@echo "make strikes  faults at random alone [SECONDS=600] [SEED=0: others every time]"
	@echo "make lint     style, strict types, import floors, rule files and their lock"
	@echo "make bench    timings in pairs, as ratios"
	@echo "make fuzz     coverage-guided fuzzing of everything that reads a stranger's bytes [SECONDS=600]"
	@echo "make cases    convert reference conversions of other people's making and compare [CASES=folder]"
	@echo "make convert IN=folder OUT=folder RULES=name [ARGS='--target …']   every checkpoint under IN, only what changed"
	@echo "make schema   write schema/rule-v1.schema.json anew"

setup: $(READY)

# What is not torch is compiled when it is first imported: of the thousands of modules of transformers and others, few ever are.
$(READY): pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt "torch"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint requirements/constraints.txt --editable . --requirement requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint requirements/constraints.txt --no-deps --requirement requirements/models.txt
	@touch $@

demo: $(READY)
	@mkdir -p build/demo
	@$(BIN)/python scripts/make_demo_checkpoint.py build/demo/in.pth
	$(BIN)/ckptconv inspect build/demo/in.pth
	$(BIN)/ckptconv run dataparallel build/demo/in.pth build/demo/out.pth --target timm:resnet18 --force

# Without a browser, a tracer and a compiler some tests are skipped, and say so; under CI=true they fail.
test: $(READY)
	@test "$$CI" != true || scripts/system_packages.sh
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

torture: $(READY)
	FAULTS=long $(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/faults/output
	@$(MAKE) --no-print-directory strikes

# Faults at random alone. SEED=0: others every time.
strikes: $(READY)
	$(BIN)/python tests/faults/output/torture.py --seconds $(SECONDS) $(if $(filter-out 0,$(SEED)),--seed $(SEED))

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

# SECONDS in all, shared by the targets. atheris comes with requirements/dev.txt where it has a wheel.
fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) --seed $(SEED)

# Real conversions with proved results. They are not part of the repository: the folder is given, or lies beside the checkout.
CASES ?= ../shared/cases
cases: $(READY)
	$(BIN)/python scripts/cases.py "$(CASES)"

schema: $(READY)
	$(BIN)/ckptconv schema > schema/rule-v1.schema.json

# `make -j4 convert` converts four at once, `make convert` one. The shell reads IN, OUT, RULES and FORMAT from its environment, where make puts
# them as they were given; ARGS are quoted as in a shell, and nothing in them is run.
AT_ONCE = $(if $(filter -j%,$(MAKEFLAGS)),$(filter-out --jobs=,$(patsubst -j%,--jobs=%,$(filter -j%,$(MAKEFLAGS)))),--jobs=1)
convert: $(READY)
	@test -n "$$IN" -a -n "$$OUT" -a -n "$$RULES" || { echo "want IN=folder OUT=folder RULES=rule" >&2; exit 2; }
	@printf '%s\n' "$$ARGS" | xargs $(BIN)/ckptconv batch --rules="$$RULES" --out="$$OUT" $${FORMAT:+"--format=$$FORMAT"} $(AT_ONCE) --force "$$IN"

clean:
	rm -rf build $(VENV)
