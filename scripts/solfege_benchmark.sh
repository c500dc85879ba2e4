#!/usr/bin/env bash
# Does the music follow words that it has never sung? Songs, their preparation, one training run, its evaluation.
# Every step can be stopped and started again: it goes on where it was.
#   bash scripts/solfege_benchmark.sh OUT [delay|flatten]
# Sizes, for a trial: SONGS of training, HELD_OUT songs each of validation and test; further flags in TRAIN and EVALUATE.
# The model that comes with the package is OUT/delay/model of such a run, with the TRAIN that its card names.
set -euo pipefail
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # large pages, on Linux: steps are quicker
out=${1:?"usage: solfege_benchmark.sh OUT [delay|flatten]"}
layout=${2:-delay}
run=$out/$layout
read -ra train <<<"${TRAIN:-}"
read -ra evaluate <<<"${EVALUATE:-}"

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/5  Songs of 8 to 16 notes, in lines, with choruses, rests and a free tempo, in four genres -> $out/songs"
# It also learns from shorter songs and from songs without tags: whoever asks for three notes shall get three. Syllables
# that come again at once are what is hardest to count: it learns from more of them than it is judged by.
kind=(--notes 8 16 --sections 1)
l2m solfege "$out/songs/train" --songs "${SONGS:-24000}" --seed 100 --notes 3 16 --sections 0.7 --repeats 0.3
l2m solfege "$out/songs/valid" --songs "${HELD_OUT:-128}" --seed 101 "${kind[@]}" --exclude "$out/songs/train"
l2m solfege "$out/songs/test" --songs "${HELD_OUT:-128}" --seed 102 "${kind[@]}" \
  --exclude "$out/songs/train" "$out/songs/valid"

step "2/5  Prepare -> $out/data"
for set in train valid test; do l2m prepare "$out/songs/$set" "$out/data/$set" --workers 2; done

step "3/5  Train (configs/benchmark.py, $layout) -> $run"
l2m train --config benchmark --model.layout "$layout" --data "$out/data/train" --valid "$out/data/valid" \
  --run "$run" "${train[@]}"
l2m align "$run" --choose "$out/data/valid"

step "4/5  Evaluate on the test songs, whose lyrics no other song has -> $run/evaluation"
l2m evaluate "$run" --data "$out/data/test" --reference "$out/data/train" --songs "${HELD_OUT:-128}" "${evaluate[@]}"

step "5/5  A model to pass on -> $run/model"
rm -rf "$run/model"  # of fewer steps, where the run was made longer since
l2m export "$run" "$run/model" --licence apache-2.0
