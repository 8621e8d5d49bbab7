# The comparison of arms in docs/results.md: make -f experiments/study.mk [DATA=cifar] [SEED=0]
# Cascades of 8x8 -> 32x32 against one model at 32x32, at equal training FLOPs. What is finished is not made again, and
# a run that was stopped goes on. Several seeds, data sets or targets may run side by side, a core each.
DATA ?= cifar
SEED ?= 0
CDM ?= cdm
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

CHANNELS_cifar := 3
CHANNELS_fashion := 1
RUN := runs/study/$(DATA)/$(SEED)
ARMS := base8 sr32 sr32_plain base32 sr32_blur sr32_unlabelled

# Steps where they are not the files': the grey images take half.
fashion_base8 := --trainer.max_steps 192 --trainer.val_check_interval 192
fashion_sr32 := --trainer.max_steps 320 --trainer.val_check_interval 320
fashion_base32 := --trainer.max_steps 568 --trainer.val_check_interval 568

sr32_plain := --model.augmentation none
sr32_blur := --model.augmentation blur
sr32_unlabelled := --model.num_classes null

.PHONY: train
train: $(ARMS:%=$(RUN)/%/loss.png)

$(RUN)/%/loss.png:
	$(CDM) fit --config experiments/defaults.yaml --config experiments/study/defaults.yaml --config experiments/study/$(firstword $(subst _, ,$*)).yaml $($*) $($(DATA)_$(firstword $(subst _, ,$*))) --data.root data/$(DATA) --model.image_channels $(CHANNELS_$(DATA)) --trainer.default_root_dir $(RUN)/$* --seed_everything $(SEED)
