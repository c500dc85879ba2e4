"""The overfit test: one model learns two excerpts by heart, and each one's lyrics call it back.

    python scripts/overfit.py SONGS OUT [--songs song_001 song_002] [--start 18 17] [--seconds 10]

Two excerpts (10 s, 1,500 codes each) of two songs of a dataset folder, each with the words that are sung in it, are
learnt until greedy generation from each one's own lyrics gives back its codes. Then the lyrics are swapped: they must
give back the other song. No genre is given, so that nothing but the words tells the songs apart. Writes
OUT/overfit_LAYOUT.json, the sung WAVs, the codec's own WAVs beside them, and spectrograms.
Stopped, it goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from l2m_jax.audio import read_audio, write_wav
from l2m_jax.checkpoint import load_model
from l2m_jax.cli import answering
from l2m_jax.codec import decode
from l2m_jax.config import Config, ModelConfig, SampleConfig, TrainConfig
from l2m_jax.data import Dataset, make_example
from l2m_jax.lyrics import parse_lyrics
from l2m_jax.model import Prompt
from l2m_jax.picture import draw_spectrograms
from l2m_jax.prepare import prepare
from l2m_jax.sample import sample_codes
from l2m_jax.songs import scan_songs
from l2m_jax.tokens import make_layout
from l2m_jax.train import train
from l2m_jax.weights import load_codec


@dataclasses.dataclass(frozen=True)
class Overfit:
    """Learn two excerpts by heart and sing them from their lyrics."""

    songs_folder: tyro.conf.Positional[Path]
    """Folder of songs."""
    out: tyro.conf.Positional[Path]
    """Where everything goes."""
    songs: tuple[str, str] = ("song_001", "song_002")
    """The two songs."""
    start: tuple[float, float] = (18.0, 17.0)
    """Where each excerpt starts, in seconds."""
    seconds: float = 10.0
    """Length of an excerpt."""
    layout: Literal["flatten", "delay"] = "flatten"
    """flatten or delay."""
    steps: int = 150
    """Training steps."""
    width: int = 256
    """Model width."""


def cut(songs_folder: Path, folder: Path, starts: dict[str, float], seconds: float) -> None:
    """Writes excerpts of the named songs as a dataset folder, each with the words that are sung in it."""
    songs = {song.id: song for song in scan_songs(songs_folder)[0]}
    for name, start in starts.items():
        song = songs[name]
        samples = read_audio(song.audio, 24_000)[round(start * 24_000) : round((start + seconds) * 24_000)]
        words = parse_lyrics(song.lyrics).words  # which times are of, unlike section tags
        if song.word_times is not None:
            inside = (song.word_times[:, 1] > start) & (song.word_times[:, 0] < start + seconds)
            words = [word for word, keep in zip(words, inside) if keep]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "lyrics.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
        write_wav(folder / name / "audio.wav", samples, 24_000)


def main(job: Overfit) -> None:
    """Cuts, prepares, trains, sings and compares."""
    console = Console()
    if not (job.out / "data" / "dataset").exists():
        cut(job.songs_folder, job.out / "excerpts", dict(zip(job.songs, job.start)), job.seconds)
        prepare(job.out / "excerpts", job.out / "data", console=console)
    dataset = Dataset(job.out / "data")
    frames = max(len(dataset[i].codes) for i in range(2))
    config = Config(
        model=ModelConfig(
            layout=job.layout, frames=frames, memory=128, width=job.width, heads=4, layers=4, text_width=384
        ),
        train=TrainConfig(
            batch=2, steps=job.steps, lr_max=1e-3, lr_min=1e-5, warmup=50, weight_decay=0.0, dropout=(0.0, 0.0, 0.0),
            checkpoint_every=50, remat="none",
        ),
    )  # fmt: skip
    run = job.out / f"run_{job.layout}"
    if stopped := train(config, dataset, run, None, console=console):
        raise SystemExit(stopped)
    model, _, step = load_model(run)
    layout = make_layout(config.model)
    codec = load_codec()
    records = [dataset[i] for i in range(2)]
    examples = [make_example(record, layout, config.model.memory) for record in records]
    report: dict[str, object] = {"layout": job.layout, "steps": step, "codes": int(records[0].codes.size)}
    for whose, order in (("own", (0, 1)), ("swapped", (1, 0))):
        # Song i of this batch is asked for with the lyrics of song order[i], and must be that song.
        prompt = Prompt(*(np.stack([getattr(examples[i], name) for i in order]) for name in Prompt._fields))
        # No guidance: without condition dropout the model has never seen a song without lyrics.
        rule = SampleConfig(temperature=0, guidance_lyrics=1)
        songs = sample_codes(model, layout, prompt, rule, [0, 1], frames)
        for i, (record, song) in enumerate(zip((records[j] for j in order), songs)):
            shared = min(len(record.codes), len(song.codes))
            same = (song.codes[:shared] == record.codes[:shared]).sum() / record.codes.size
            report[f"{records[i].song} asked with {whose} lyrics: share of the codes of {record.song}"] = float(same)
            if whose == "own":
                sung, codec_only = decode(codec, song.codes), decode(codec, record.codes.astype(np.int32))
                name = job.out / f"{record.song}_{job.layout}"
                write_wav(name.with_suffix(".wav"), sung, codec.rate)
                write_wav(job.out / f"{record.song}_codec.wav", codec_only, codec.rate)
                excerpt = read_audio(job.out / "excerpts" / record.song / "audio.wav", codec.rate)
                sounds = {
                    "the excerpt": excerpt,
                    "the codec's own reconstruction": codec_only,
                    f"sung from its lyrics ({same:.1%} of codes)": sung,
                }
                draw_spectrograms(name.with_suffix(".png"), sounds, codec.rate)
    (job.out / f"overfit_{job.layout}.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(report)


if __name__ == "__main__":
    with answering("overfit"):
        main(tyro.cli(Overfit))
