# The comparison of arms in docs/results.md: make -f experiments/study.mk [DATA=cifar] [SEED=0]
# Cascades of 8x8 -> 32x32 against one model at 32x32, at equal training FLOPs. What is finished is not made again, and
# a run that was stopped goes on. Several data sets and seeds may run side by side, a core each. CIFAR-10 is prepared by
# data/cifar.py; `make -f experiments/study.mk table` gathers what has been measured.
DATA ?= cifar
SEED ?= 0
CDM ?= .venv/bin/cdm
PYTHON ?= .venv/bin/python
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

CHANNELS_cifar := 3
CHANNELS_fashion := 1
DETECTOR_cifar := runs/detectors/cifar-cnn-64.safetensors
DETECTOR_fashion := fashion-cnn-64
ROOT := runs/study/$(DATA)
RUN := $(ROOT)/$(SEED)
N := 2000
S := 501
# So few ancestral steps would leave noise in the images, and hide every other effect (docs/results.md).
FAST := --precision bf16-mixed --sampler dpm++

.SECONDARY:
.PHONY: all train search measure cas inception table
all: train search measure cas

# -- training: one run a stage

STAGES := base8 sr32 sr32_plain base32 sr32_blur sr32_unlabelled
sr32_plain := --model.augmentation none
sr32_blur := --model.augmentation blur
sr32_unlabelled := --model.num_classes null
# Steps where they are not the files': the grey images take half.
fashion_base8 := --trainer.max_steps 192 --trainer.val_check_interval 192
fashion_sr32 := --trainer.max_steps 320 --trainer.val_check_interval 320
fashion_base32 := --trainer.max_steps 568 --trainer.val_check_interval 568
yaml_of = $(firstword $(subst _, ,$(1)))

train: $(STAGES:%=$(RUN)/%/trained)

$(RUN)/%/trained:
	$(CDM) fit --config experiments/defaults.yaml --config experiments/study/defaults.yaml --config experiments/study/$(call yaml_of,$*).yaml $($*) $($(DATA)_$(call yaml_of,$*)) --data.root data/$(DATA) --model.image_channels $(CHANNELS_$(DATA)) --trainer.default_root_dir $(RUN)/$* --seed_everything $(SEED)
	touch $@

# -- bundles, references, and the search over s of the cascade with Gaussian augmentation

STAGES_single := base32
STAGES_plain := base8 sr32_plain
STAGES_gaussian := base8 sr32
STAGES_blur := base8 sr32_blur
STAGES_unlabelled := base8 sr32_unlabelled
comma := ,
empty :=
BUNDLES := single plain gaussian blur unlabelled

$(foreach b,$(BUNDLES),$(eval $(RUN)/bundles/$(b)/bundle.json: $(STAGES_$(b):%=$(RUN)/%/trained)))
$(BUNDLES:%=$(RUN)/bundles/%/bundle.json): $(RUN)/bundles/%/bundle.json:
	$(CDM) bundle --checkpoints "[$(subst $(empty) ,$(comma),$(STAGES_$*:%=$(RUN)/%))]" --out $(RUN)/bundles/$*

runs/detectors/%-cnn-64.safetensors:
	mkdir -p runs/detectors
	$(PYTHON) data/detector.py data/$* $@ --width 32 --epochs 8 --seed 0

$(ROOT)/%-32.safetensors: $(filter runs/%,$(DETECTOR_$(DATA)))
	$(CDM) reference --shards data/$(DATA) --split $* --resolution 32 --detector $(DETECTOR_$(DATA)) --keep 5000 --out $@

search: $(RUN)/search/results.json

$(RUN)/search/results.json: $(RUN)/bundles/gaussian/bundle.json $(filter runs/%,$(DETECTOR_$(DATA)))
	$(CDM) search --bundle $(RUN)/bundles/gaussian --out $(RUN)/search --shards data/$(DATA) --detector $(DETECTOR_$(DATA)) --n $(N) --levels "[251,501,1001]" $(FAST) --sampling_steps "[10,10]" --seed $(SEED) --store true

# -- samples of the arms and their figures

# 16 calls of base32 cost what 10 of base8 and 10 of sr32 cost together.
OPTIONS_single := --levels "[]" --sampling_steps "[16]"
# The base model is the same one: they go on from the low-resolution samples that the search stored.
START := --start $(RUN)/search/low_res/base8-seed$(SEED)/train/8 --truncated false
OPTIONS_plain := $(START) --levels "[0]" --sampling_steps "[10,10]"
OPTIONS_blur := $(START) --levels "[0]" --sampling_steps "[10,10]"
OPTIONS_unlabelled := $(START) --levels "[$(S)]" --sampling_steps "[10,10]"
SAMPLED := single plain blur unlabelled
# Points of the search: at s = 0, at S, and at the best s > 0 of each kind of truncation.
POINT := $(RUN)/search/points/sr32
FOLDER_clean = $(POINT)-generated-s0-dpm++-10-seed$(SEED)
FOLDER_noised = $(POINT)-non-truncated-s$(S)-dpm++-10-seed$(SEED)
FOLDER_truncated = $(POINT)-truncated-s$(S)-dpm++-10-seed$(SEED)
FOLDER_best_noised = $$($(PYTHON) experiments/study_table.py $(RUN)/search --best non-truncated)
FOLDER_best_truncated = $$($(PYTHON) experiments/study_table.py $(RUN)/search --best truncated)
STEPS := 4steps 25steps 100steps
$(foreach arm,$(SAMPLED) $(STEPS),$(eval FOLDER_$(arm) := $(RUN)/samples/$(arm)))
FOUND := clean noised truncated best_noised best_truncated
ARMS := $(SAMPLED) $(FOUND)

measure: $(SAMPLED:%=$(RUN)/samples/%/samples.png) $(ARMS:%=$(RUN)/evaluations/%/results.json) $(STEPS:%=$(RUN)/samples/%/samples.png) $(STEPS:%=$(RUN)/evaluations/%/results.json)

$(SAMPLED:%=$(RUN)/samples/%/samples.png): $(RUN)/samples/%/samples.png: $(RUN)/bundles/%/bundle.json $(RUN)/search/results.json
	$(CDM) sample --bundle $(RUN)/bundles/$* --out $(RUN)/samples/$* --count $(N) $(OPTIONS_$*) $(FAST) --seed $(SEED) --block_size 100

# The last stage with other numbers of steps, on the low-resolution samples that the search stored.
$(RUN)/samples/%steps/samples.png: $(RUN)/search/results.json
	$(CDM) sample --bundle $(RUN)/bundles/gaussian --out $(RUN)/samples/$*steps $(START) --count 500 --levels "[$(S)]" --sampling_steps "[10,$*]" $(FAST) --seed $(SEED) --block_size 100

$(foreach arm,$(SAMPLED) $(STEPS),$(eval $(RUN)/evaluations/$(arm)/results.json $(RUN)/cas/$(arm)/results.json: $(RUN)/samples/$(arm)/samples.png))
$(foreach arm,$(FOUND),$(eval $(RUN)/evaluations/$(arm)/results.json $(RUN)/cas/$(arm)/results.json: $(RUN)/search/results.json))

$(RUN)/evaluations/%/results.json: $(ROOT)/train-32.safetensors $(ROOT)/val-32.safetensors
	$(CDM) evaluate --samples "[$(FOLDER_$*)]" --references "[$(ROOT)/train-32.safetensors,$(ROOT)/val-32.safetensors]" --detector $(DETECTOR_$(DATA)) --out $(RUN)/evaluations/$* --real data/$(DATA)

# The control on real images is the same for every arm: it is trained for the first one, which the others wait for.
cas: $(ARMS:%=$(RUN)/cas/%/results.json)
$(foreach arm,$(filter-out single,$(ARMS)),$(eval $(RUN)/cas/$(arm)/results.json: $(RUN)/cas/single/results.json))

$(RUN)/cas/%/results.json:
	mkdir -p $(RUN)/cas/$*
	if test -d $(RUN)/cas/single/runs/real-0 && test $* != single; then cp -rn $(RUN)/cas/single/real $(RUN)/cas/$*/; mkdir -p $(RUN)/cas/$*/runs; cp -rn $(RUN)/cas/single/runs/real-0 $(RUN)/cas/$*/runs/; fi
	$(CDM) cas --config experiments/study/cas.yaml --samples $(FOLDER_$*) --shards data/$(DATA) --out $(RUN)/cas/$*

# -- FID and KID with the canonical network (make detector) at a few deciding points: 0.2 s an image on one core

INCEPTION := clean best_truncated plain single blur
inception: $(INCEPTION:%=$(RUN)/inception/%/results.json)

$(ROOT)/inception-%-32.safetensors:
	$(CDM) reference --shards data/$(DATA) --split $* --resolution 32 --detector inception-2015-12-05 --count 2500 --keep 2500 --out $@

$(RUN)/inception/%/results.json: $(ROOT)/inception-val-32.safetensors $(RUN)/evaluations/%/results.json
	$(CDM) evaluate --samples "[$(FOLDER_$*)]" --references "[$(ROOT)/inception-val-32.safetensors]" --detector inception-2015-12-05 --out $(RUN)/inception/$*

table:
	$(PYTHON) experiments/study_table.py runs/study
