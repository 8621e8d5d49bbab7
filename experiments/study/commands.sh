#!/bin/bash
# The study: a single model at 32x32 against cascades 8x8 -> 32x32 with and without conditioning augmentation.
#   bash experiments/study/commands.sh cifar 0        (or fashion; data/cifar.py prepares CIFAR-10)
# It runs one data set and seed. Finished parts are skipped, and stopped ones resume. docs/results.md has the results.
set -euo pipefail
data=${1:-cifar} seed=${2:-0} n=2000
cdm=${CDM:-.venv/bin/cdm}
run=runs/study/$data/$seed
channels=1 detector=fashion-cnn-64
if [ "$data" = cifar ]; then
  channels=3 detector=runs/detectors/cifar-cnn-64.safetensors
  mkdir -p runs/detectors
  [ -e "$detector" ] || .venv/bin/python data/detector.py data/cifar "$detector" --width 32 --epochs 8 --seed 0
fi
fast=(--precision bf16-mixed --sampler dpm++)  # with few ddpm steps, leftover noise would hide all other effects

# Six trainings, one per stage. The cascades share base8.
fit() {
  file=$1 name=$2; shift 2
  $cdm fit --config experiments/defaults.yaml --config experiments/study/defaults.yaml --config "experiments/study/$file.yaml" \
    --data.root "data/$data" --model.image_channels "$channels" --seed_everything "$seed" --trainer.default_root_dir "$run/$name" "$@"
}
# The grey images train for half of the steps in the files.
steps() { if [ "$data" = fashion ]; then echo "--trainer.max_steps $1 --trainer.val_check_interval $1"; fi; }
fit base8 base8 $(steps 192)
fit base32 base32 $(steps 568)
fit sr32 sr32 $(steps 320)
fit sr32 sr32_plain --model.augmentation none $(steps 320)
fit sr32 sr32_blur --model.augmentation blur $(steps 320)
fit sr32 sr32_unlabelled --model.num_classes null $(steps 320)

# Five bundles.
$cdm bundle --checkpoints "[$run/base32]" --out "$run/bundles/single"
$cdm bundle --checkpoints "[$run/base8,$run/sr32_plain]" --out "$run/bundles/plain"
$cdm bundle --checkpoints "[$run/base8,$run/sr32]" --out "$run/bundles/gaussian"
$cdm bundle --checkpoints "[$run/base8,$run/sr32_blur]" --out "$run/bundles/blur"
$cdm bundle --checkpoints "[$run/base8,$run/sr32_unlabelled]" --out "$run/bundles/unlabelled"

# Search over the level s of the cascade with Gaussian augmentation, on generated and on real input.
$cdm search --bundle "$run/bundles/gaussian" --out "$run/search" --shards "data/$data" --detector "$detector" --n "$n" \
  --levels "[251,501,1001]" --sampling_steps "[10,10]" "${fast[@]}" --seed "$seed" --store true

# The other arms continue from the low-resolution samples that the search stored. 16 calls of base32 cost as much as 10
# of base8 and 10 of sr32 together.
draw() {
  name=$1; shift
  $cdm sample --bundle "$run/bundles/$name" --out "$run/samples/$name" --count "$n" --block_size 100 --seed "$seed" "${fast[@]}" "$@"
}
stored=(--start "$run/search/low_res/base8-seed$seed/train/8" --truncated false --sampling_steps "[10,10]")
draw single --levels "[]" --sampling_steps "[16]"
draw plain "${stored[@]}" --levels "[0]"
draw blur "${stored[@]}" --levels "[0]"
draw unlabelled "${stored[@]}" --levels "[501]"

# Measure every arm: distances, precision and recall, and the classification accuracy score.
for split in train val; do
  card=runs/study/$data/$split-32.safetensors
  [ -e "$card" ] || $cdm reference --shards "data/$data" --split $split --resolution 32 --detector "$detector" --keep 5000 --out "$card"
done
for arm in single plain blur unlabelled; do
  $cdm evaluate --samples "[$run/samples/$arm]" --detector "$detector" --out "$run/evaluations/$arm" --real "data/$data" \
    --references "[runs/study/$data/train-32.safetensors,runs/study/$data/val-32.safetensors]"
  $cdm cas --config experiments/study/cas.yaml --samples "$run/samples/$arm" --shards "data/$data" --out "$run/cas/$arm"
done
