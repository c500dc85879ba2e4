#!/usr/bin/env bash
# The whole system on a laptop: a song from the model that comes along, then one from a model trained here from nothing.
# Every step can be stopped and started again: it goes on where it was.
#   bash scripts/demo.sh demo
set -euo pipefail
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # large pages, on Linux: steps are quicker
out=${1:-demo}
shipped=$(python -c 'from l2m_jax.checkpoint import DEFAULT; print(DEFAULT)')

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/7  The model that comes with the package sings -> $out/first.wav, .png, .lrc"
echo "     A synthetic voice sings syllables (do re mi ...), each at its own pitch: anybody can hear whether it follows."
l2m generate --lyrics $'do mi sol mi\nfa la sol fa\nmi re do\n' --genre waltz -o "$out/first.wav" --picture --lrc

step "2/7  Songs: 4,000 short solfege songs with lyrics, genres and word times -> $out/songs"
l2m solfege "$out/songs" --songs 4000 --seed 7 --notes 3 5
# Seeds 4242 and 4243 have never been used to choose a setting, and no lyric of 4243 is one of the shipped model's.
l2m solfege "$out/held_out_songs" --songs 64 --seed 4242 --notes 3 5 --exclude "$out/songs"
l2m solfege "$out/long_songs" --songs 32 --seed 4243 --notes 8 16 --sections 1  # of the kind that the shipped model knows

step "3/7  Prepare: sound -> EnCodec codes, lyrics -> BERT states, packed into ArrayRecord -> $out/data"
l2m prepare "$out/songs" "$out/data" --workers 2
l2m prepare "$out/held_out_songs" "$out/held_out"
l2m prepare "$out/long_songs" "$out/long"

step "4/7  Train a small SoundTransformer from nothing (configs/demo.py) -> $out/run"
echo "     loss: nats per code; valid_loss: the same on songs it never trains on; diagonality grows when it sings along."
echo "     tensorboard --logdir $out/run"
l2m train --config demo --data "$out/data" --valid "$out/held_out" --run "$out/run"

# A model so little trained sings better at a lower temperature than the default.
step "5/7  It sings: lyrics that no training song has -> $out/song.wav, .ecdc, .npz, .json, .png"
l2m generate "$out/run" --lyrics "sol mi do sol la" --genre march --temperature 0.4 -o "$out/song.wav" --picture

step "6/7  Decode the codes again -> $out/again.wav"
l2m decode "$out/song.ecdc" -o "$out/again.wav"

step "7/7  Do they follow? Unseen lyrics, sung and heard by pitch tracking -> $out/evaluation, $out/evaluation_shipped"
l2m evaluate "$out/run" --data "$out/held_out" --out "$out/evaluation" --sampling.temperature 0.4
l2m evaluate "$shipped" --data "$out/long" --out "$out/evaluation_shipped" --only generation --songs 32

step "Done"
python - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
for name, folder in (("trained here, 3 to 5 notes", "evaluation"), ("comes along, 8 to 16 notes", "evaluation_shipped")):
    sung = json.loads((out / folder / "evaluation.json").read_text())["generation"]
    right, ended = sung["generated"]["notes"]["note_accuracy"]["value"], sung["generated"]["ended_by_themselves"]["value"]
    print(f"{name}: {right:.1%} of the notes of {sung['songs']} unseen lyrics right, {ended:.1%} of the songs ended by themselves")
PY
echo "listen to $out/first.wav and $out/song.wav, look at $out/first.png and $out/evaluation/evaluation.md"
