"""How long does it take to learn a song by heart, as songs get longer? Measured at some lengths, and extrapolated.

    python scripts/overfit_length.py SONGS OUT [--seconds 5 10 30] [--song song_001] [--start 18] [--hours 6]

Of each length one excerpt is learnt until greedy generation from its lyrics gives back at least 99 % of its codes
(`flatten`: 150 codes a second). Then the step at 120 s is timed, and the steps that it would need are read off a
straight line through the logarithms of steps and lengths. Where that takes no more than --hours, the 120 s are learnt
too. Writes OUT/overfit_length.json; stopped, it goes on from the last checkpoint of the excerpt that it was at.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from overfit import cut
from rich.console import Console

from l2m_jax.checkpoint import load_model, open_checkpoints
from l2m_jax.cli import answering
from l2m_jax.config import Config, ModelConfig, SampleConfig, TrainConfig
from l2m_jax.data import Dataset, Record, make_example
from l2m_jax.model import SoundTransformer, prompt_of
from l2m_jax.prepare import prepare
from l2m_jax.progress import say
from l2m_jax.sample import sample_codes
from l2m_jax.tokens import Layout, make_layout
from l2m_jax.train import train

LEARNT = 0.05  # nats a code: above it greedy generation gives back no whole excerpt, and is not tried
MEMORY = 256


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Learn excerpts of growing length by heart."""

    songs_folder: tyro.conf.Positional[Path]
    """Folder of songs."""
    out: tyro.conf.Positional[Path]
    """Where everything goes."""
    seconds: tuple[float, ...] = (5.0, 10.0, 30.0)
    """Lengths of the excerpts."""
    full: float = 120.0
    """Length to which is extrapolated."""
    song: str = "song_001"
    """The song."""
    start: float = 18.0
    """Where the excerpts start, in seconds."""
    hours: float = 6.0
    """The full length is learnt too where the extrapolation says that it takes no longer; 0 for never."""
    share: float = 0.99
    """Of the codes, that greedy generation must give back."""
    steps: int = 2000
    """At most."""
    every: int = 20
    """Steps between checkpoints, at which generation is tried."""
    width: int = 256
    """Model width."""


def make_config(job: Lengths, frames: int, steps: int) -> Config:
    """Shaped like `small`, narrower. One rate after the warm-up: how many steps are needed is what is asked."""
    return Config(
        model=ModelConfig(
            layout="flatten", frames=frames, memory=MEMORY, width=job.width, heads=4, key_heads=1, layers=4, norm="pre"
        ),
        train=TrainConfig(
            batch=1, steps=steps, lr_max=1e-3, lr_min=1e-3, warmup=20, weight_decay=0.0, dropout=(0.0, 0.0, 0.0),
            checkpoint_every=job.every, valid_every=steps, log_every=10,
        ),
    )  # fmt: skip


def given_back(model: SoundTransformer, layout: Layout, record: Record) -> float:
    """Share of the song's codes that greedy generation from its lyrics says, each in its place."""
    example = make_example(record, layout, MEMORY)
    prompt = jax.tree.map(lambda x: np.asarray(x)[None], prompt_of(example))
    rule = SampleConfig(temperature=0, guidance_lyrics=1)
    song = sample_codes(model, layout, prompt, rule, [0], len(record.codes))[0]
    shared = min(len(record.codes), len(song.codes))
    return float((song.codes[:shared] == record.codes[:shared]).sum() / record.codes.size)


def log_of(run: Path) -> list[dict[str, Any]]:
    """What the training wrote."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def excerpt(job: Lengths, seconds: float) -> Dataset:
    """The prepared excerpt of a length."""
    folder = job.out / f"{seconds:g}s"
    if not (folder / "data" / "dataset").exists():
        cut(job.songs_folder, folder / "excerpts", {job.song: job.start}, seconds)
        prepare(folder / "excerpts", folder / "data", console=Console(quiet=True))
    return Dataset(folder / "data")


def learn(job: Lengths, seconds: float, console: Console) -> dict[str, float]:
    """Learns the excerpt of a length."""
    dataset, run = excerpt(job, seconds), job.out / f"{seconds:g}s" / "run"
    config = make_config(job, len(dataset[0].codes), job.steps)
    layout, shares = make_layout(config.model), {}

    def enough(model: SoundTransformer, step: int) -> bool:
        if log_of(run)[-1]["loss"] > LEARNT:
            return False
        shares[step] = given_back(model, layout, dataset[0])
        say(console, f"{seconds:g} s, step {step}: {shares[step]:.1%} of the codes given back")
        return shares[step] >= job.share

    step = 0
    if (run / "config.json").exists():
        with open_checkpoints(run, config.train.keep) as checkpoints:
            step = checkpoints.latest.step if checkpoints.latest else 0
    if not (step and enough(load_model(run, step)[0], step)):
        if stopped := train(config, dataset, run, None, console=console, enough=enough):
            raise SystemExit(stopped)
        if not any(share >= job.share for share in shares.values()):
            raise SystemExit(f"{seconds:g} s: not learnt in {job.steps} steps; give it more --steps")
        step = max(shares)
    lines = log_of(run)
    return {
        "seconds": seconds,
        "codes": dataset[0].codes.size,
        "steps": step,
        "given_back": shares.get(step, 0.0),
        "step_s": statistics.median(dataset[0].codes.size / line["codes_per_s"] for line in lines[1:]),
    }


def time_full(job: Lengths, console: Console) -> float:
    """A step at the full length, in seconds: the median of three, after the first two."""
    dataset, run = excerpt(job, job.full), job.out / f"{job.full:g}s" / "timing"
    config = make_config(job, len(dataset[0].codes), 5)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=1, warmup=1))
    if stopped := train(config, dataset, run, None, console=console):
        raise SystemExit(stopped)
    return statistics.median(dataset[0].codes.size / line["codes_per_s"] for line in log_of(run)[2:])


def main(job: Lengths) -> None:
    """Every length, then the extrapolation."""
    console = Console()
    found = [learn(job, seconds, console) for seconds in job.seconds]
    lengths, needed = (np.log([one[name] for one in found]) for name in ("codes", "steps"))
    slope, offset = np.polyfit(lengths, needed, 1)
    codes = found[-1]["codes"] * job.full / found[-1]["seconds"]
    steps, step_s = float(np.exp(offset + slope * np.log(codes))), time_full(job, console)
    report = {
        "measured": found,
        "steps_grow_with_codes_to_the_power": float(slope),
        "extrapolated": {"seconds": job.full, "steps": steps, "step_s": step_s, "hours": steps * step_s / 3600},
    }
    _write(job, report)
    if report["extrapolated"]["hours"] <= job.hours:
        _write(job, report | {"full": learn(job, job.full, console)})


def _write(job: Lengths, report: dict[str, Any]) -> None:
    (job.out / "overfit_length.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    with answering("overfit_length"):
        main(tyro.cli(Lengths))
