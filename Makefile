# Every word does its own set-up; a machine with Python 3.11+, pip and git is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-lowest test-newest lint format docs tiny results rl teachers distill fast few study package release clean

install: $(READY)

# torch first: what it installs is then what every other package builds on.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/unmask demo

# A process a core, each with one thread; one test at a time: .venv/bin/python -m pytest tests/test_x.py
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(READY) docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into site/; a dead link or a name that does not exist fails.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Train the shipped model from nothing (hours on two cores).
tiny: $(READY)
	$(BIN)/unmask sft configs/tiny/sft.yaml

# The tables and figures of docs/results.md (about half an hour on two cores).
results: $(READY)
	$(BIN)/unmask eval --limit 256 --batch-size 64 --no-early-stop --output runs/results --decoder \
		full semi-ar eoser full:steps=7 ass eoser-ass hybrid
	$(BIN)/unmask eval --limit 256 --batch-size 64 --no-early-stop --output runs/heldout --split heldout --task sudoku \
		--decoder full:steps=7 ass eoser-ass
	$(BIN)/unmask eval --limit 16 --batch-size 16 --output runs/eos --trajectories --task countdown \
		--decoder full semi-ar eoser

# Reinforcement learning on the shipped model: objectives x tasks x seeds (four to eleven minutes each on two cores), then tests.
SEEDS ?= 0 1 2
OBJECTIVES ?= cj one_step diffu
RL_TASKS ?= sudoku countdown
rl: $(READY)
	for seed in $(SEEDS); do for objective in $(OBJECTIVES); do for task in $(RL_TASKS); do \
		run=runs/rl/$${objective}_$$task-$$seed; \
		$(BIN)/unmask rl configs/tiny/$${objective}_$$task.yaml --seed $$seed --output-dir $$run && \
		$(BIN)/unmask eval --model $$run/final --task $$task --decoder eoser-ass --limit 256 --batch-size 64 \
			--output $$run/test || exit 1; \
	done; done; done

# Few passes (docs/distill.md). Teachers are right decodes of training problems under `threshold`.
LIMIT_sudoku := 900
LIMIT_countdown := 6000
# bfloat16 needs a processor that multiplies it (AVX-512 BF16, AMX); elsewhere: make few DTYPE=float32 FEW_FLAGS=--no-bf16.
DTYPE ?= bfloat16
TEACH = --split train --seed 1 --dtype $(DTYPE) --batch-size 64 --trajectories
teachers: runs/teacher/sudoku/summary.json runs/teacher/countdown/summary.json
runs/teacher/%/summary.json: $(READY)
	$(BIN)/unmask eval --task $* --limit $(LIMIT_$*) $(TEACH) --output runs/teacher/$* --decoder threshold

# Sudoku and Countdown together (half an hour on two cores).
distill: teachers
	$(BIN)/unmask distill configs/tiny/distill.yaml

# `tiny-fast`: Sudoku is distilled, Countdown is reinforced, then both are distilled, Countdown from what the reinforced model
# solves in seven passes (an hour and a quarter on one core).
fast: runs/teacher/sudoku/summary.json
	$(BIN)/unmask distill configs/tiny/distill.yaml --tasks sudoku --teacher runs/teacher/sudoku --max-steps 100 \
		--output-dir runs/fast/sudoku
	$(BIN)/unmask rl configs/tiny/fast.yaml --model runs/fast/sudoku/final --output-dir runs/fast/countdown
	$(BIN)/unmask eval --model runs/fast/countdown/final --task countdown --limit 8000 $(TEACH) --output runs/teacher/fast \
		--decoder eoser-ass
	$(BIN)/unmask distill configs/tiny/distill.yaml --model runs/fast/countdown/final --teacher runs/teacher/sudoku \
		runs/teacher/fast --max-steps 80 --warmup-steps 10 --learning-rate 2e-4 --validation-problems 128 --eval-steps 20 \
		--save-steps 20 --output-dir runs/fast/both

# Distillation alone, reinforcement alone, and both, a task at a time, about as many forward passes each; 256 test problems.
# Other students: make few STUDENT=eoser:steps=7, or STUDENT=threshold FEW_FLAGS=--no-compile.
STUDENT ?= eoser-ass
FEW_FLAGS ?=
few: teachers
	for seed in $(SEEDS); do for task in $(RL_TASKS); do \
		out=runs/few/$(STUDENT)/$$task-$$seed; set="--decoder $(STUDENT) --seed $$seed $(FEW_FLAGS) --output-dir $$out"; \
		distill="$(BIN)/unmask distill configs/tiny/distill.yaml --tasks $$task --teacher runs/teacher/$$task $$set"; \
		rl="$(BIN)/unmask rl configs/tiny/cj_$$task.yaml $$set"; \
		$$distill-distill --max-steps 120 && $$rl-rl --max-steps 30 && \
		$$distill-half --max-steps 60 && $$rl-both --model $$out-half/final --max-steps 15 || exit 1; \
		for run in distill rl both; do \
			$(BIN)/unmask eval --model $$out-$$run/final --task $$task --limit 256 --batch-size 64 --dtype $(DTYPE) \
				--decoder $(STUDENT) --output $$out-$$run/test || exit 1; \
		done; \
	done; done

# The studies of docs/results.md and docs/results-rl.md: hours; each goes on where it was stopped.
STUDIES ?= decoders ascending gamma lengths order objectives variants
study: $(READY)
	for study in $(STUDIES); do $(BIN)/python -m benchmarks study configs/study/$$study.yaml --jobs 2 || exit 1; done

# The core of the suite on the lowest versions that pyproject.toml allows, and on the newest; torch is that of constraints.txt.
CORE := plan rules decode blocks models checkpoints objectives rl rl_parts training distill evaluation tasks answers generate cli
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: export PYTHONPATH =
test-lowest test-newest:
	$(PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/pip install --quiet uv $$(grep '^torch==' constraints.txt)
	grep '^torch==' constraints.txt > .venv-$@/torch.txt
	.venv-$@/bin/uv pip install --quiet --python .venv-$@ --resolution $(RESOLUTION) --constraint .venv-$@/torch.txt '.[serve,benchmarks]'
	.venv-$@/bin/uv pip install --quiet --python .venv-$@ pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .venv-$@/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(CORE:%=tests/test_%.py)

# Wheel and source distribution: metadata, the wheel at work in a clean environment and another folder, the source's tests.
package: export PYTHONPATH =
package:
	rm -rf dist .venv-package && $(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --quiet build twine $$(grep '^torch==' constraints.txt)
	.venv-package/bin/python -m build --outdir dist . && .venv-package/bin/twine check --strict dist/*
	.venv-package/bin/pip install --quiet --constraint constraints.txt dist/*.whl pytest hypothesis scipy
	tar -xzf dist/*.tar.gz -C .venv-package
	cd .venv-package && PATH=$$PWD/bin:$$PATH && unmask --version && unmask generate "make 26 from 6 10 10" --decoder eoser-ass \
		&& unmask eval --task sudoku --decoder eoser-ass --limit 4 --output eval && unmask view --task sudoku --index 0 --output view.html \
		&& cd unmask-*/ && python -m pytest -p no:cacheprovider tests/test_plan.py tests/test_decode.py tests/test_names.py

# Everything that a release asks, up to the upload, which is a person's: twine upload dist/*
release: lint test test-lowest test-newest package
	git diff --quiet HEAD || { echo "commit first: the release is what is committed"; exit 1; }
	grep -q "^Repository = " pyproject.toml || { echo "project.urls of pyproject.toml lacks Repository: add it"; exit 1; }
	! grep -q unreleased CHANGELOG.md || { echo "CHANGELOG.md says unreleased: write the date"; exit 1; }
	@echo "dist/ is ready: git tag v$$($(BIN)/unmask --version), then twine upload dist/*"

clean:
	rm -rf $(VENV) .venv-* build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
