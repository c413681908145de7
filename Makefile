# Every word does its own set-up; a machine with Python 3.10+, pip and git is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test lint format docs tiny results rl teachers distill few study clean

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

# Distillation on the shipped model (docs/distill.md): teachers, then seven passes (half an hour on two cores).
teachers: $(READY)
	$(BIN)/unmask eval --task sudoku --limit 900 --split train --seed 1 --dtype bfloat16 --batch-size 64 --trajectories \
		--output runs/teacher/sudoku --decoder threshold
	$(BIN)/unmask eval --task countdown --limit 6000 --split train --seed 1 --dtype bfloat16 --batch-size 64 --trajectories \
		--output runs/teacher/countdown --decoder threshold

distill: teachers
	$(BIN)/unmask distill configs/tiny/distill.yaml

# Distillation alone, reinforcement alone, and both, each then tested on 256 problems a task.
# About as many forward passes each, if a rollout of fast.yaml samples 1.7 completions for one that it keeps (samples_per_completion).
FEW_DECODERS ?= eoser-ass full:steps=7
few: teachers
	for seed in $(SEEDS); do \
		$(BIN)/unmask distill configs/tiny/distill.yaml --seed $$seed --output-dir runs/few/distill-$$seed && \
		$(BIN)/unmask rl configs/tiny/fast.yaml --model tiny --max-steps 92 --seed $$seed --output-dir runs/few/rl-$$seed && \
		$(BIN)/unmask distill configs/tiny/distill.yaml --max-steps 125 --seed $$seed --output-dir runs/few/half-$$seed && \
		$(BIN)/unmask rl configs/tiny/fast.yaml --model runs/few/half-$$seed/final --max-steps 46 --eval-steps 20 \
			--save-steps 20 --seed $$seed --output-dir runs/few/both-$$seed && \
		for run in distill rl both; do \
			$(BIN)/unmask eval --model runs/few/$$run-$$seed/final --limit 256 --batch-size 64 --decoder $(FEW_DECODERS) \
				--output runs/few/$$run-$$seed/test || exit 1; \
		done || exit 1; \
	done

# The studies of docs/results.md and docs/results-rl.md: hours; each goes on where it was stopped.
STUDIES ?= decoders ascending gamma lengths objectives variants
study: $(READY)
	for study in $(STUDIES); do $(BIN)/python -m benchmarks study configs/study/$$study.yaml --jobs 2 || exit 1; done

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
