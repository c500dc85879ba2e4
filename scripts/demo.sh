#!/usr/bin/env bash
# The whole system on a laptop, from nothing to a song: 23 minutes on two busy CPU cores.
# Every step can be stopped and started again: it goes on where it was.
#   bash scripts/demo.sh demo
set -euo pipefail
out=${1:-demo}

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/6  Songs: 4,000 short solfege songs with lyrics, genres and word times -> $out/songs"
echo "     A synthetic voice sings random syllables (do re mi ...), each at its own pitch, in four genres."
l2m solfege "$out/songs" --songs 4000 --seed 7 --notes 3 5
# Seed 4242 has never been used to choose a setting: temperature and guidance were chosen on lyrics of seed 8.
l2m solfege "$out/held_out_songs" --songs 64 --seed 4242 --notes 3 5 --exclude "$out/songs"

step "2/6  Prepare: sound -> EnCodec codes, lyrics -> BERT states, packed into ArrayRecord -> $out/data"
l2m prepare "$out/songs" "$out/data" --workers 2
l2m prepare "$out/held_out_songs" "$out/held_out"

step "3/6  Train a small SoundTransformer from nothing (configs/demo.py) -> $out/run"
echo "     loss: nats per code; valid_loss: the same on songs it never trains on. tensorboard --logdir $out/run"
l2m train --config demo --data "$out/data" --valid "$out/held_out" --run "$out/run"

step "4/6  Sing: lyrics that no training song has -> $out/song.wav, .ecdc, .npz, .json, .png"
l2m generate "$out/run" --lyrics "sol mi do sol la" --genre march --temperature 0.7 --guidance-lyrics 2 -o "$out/song.wav" --picture

step "5/6  Decode the codes again -> $out/again.wav"
l2m decode "$out/song.ecdc" -o "$out/again.wav"

step "6/6  Does it follow? Bits that the words save, word starts, 64 unseen lyrics sung and heard -> $out/evaluation"
l2m evaluate "$out/run" --data "$out/held_out" --out "$out/evaluation"

step "Done: listen to $out/song.wav, look at $out/song.png and $out/evaluation/evaluation.md"
