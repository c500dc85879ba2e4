"""How fast and how lean is a train step of `small`, one song of up to 18,000 codes? Beside the yardstick.

    python scripts/bench_train.py [--yardstick DIR] [--attention-width 512] [--short]

DIR holds seed_torch.py, whose `train` is run in turn with our own step, each in a process of its own. Random weights,
random codes, `flatten`, 256 lyric states, batch 1, AdamW. Figures are medians over the rounds; start-up (imports and
weights) and compilation are timed apart, their memory is part of the peak. Prints one JSON line last:

    codes_per_s                   codes of the song over the median step
    speed_ratio                   that over the yardstick's, both at the full length; its attention is 512 wide
    memory_ratio                  peak of resident memory over the yardstick's
    memory_growth_4500_to_18000   peak at 18,000 codes over that at 4,500; the windows have 18,432 and 5,120 positions
    step_s_N, peak_mib_N          a step, and the peak, at N codes
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

CODES = (2250, 4500, 9000, 18_000)
LYRICS = 256  # states, as the yardstick has


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure training."""

    yardstick: Path | None = None
    """Folder of seed_torch.py."""
    rounds: int = 3
    """Times that everything is measured, in turn."""
    steps: int = 2
    """Timed steps a process, after one that is not."""
    short: bool = False
    """One round of the two shortest lengths, while developing."""
    attention_width: int | None = None
    """Instead of the preset's; 512 is the yardstick's."""
    codes: int = 0
    """What the processes that this one starts do: train on so many codes."""


def train(codes: int, steps: int, attention_width: int | None) -> dict[str, float]:
    """Run in a process of its own: steps on one song. JAX is imported here, so that the parent of all stays small."""
    began = time.perf_counter()
    import jax
    import numpy as np
    from flax import nnx

    from l2m_jax.cli import load_preset
    from l2m_jax.data import Example
    from l2m_jax.model import LYRIC, SoundTransformer
    from l2m_jax.optim import optimizer
    from l2m_jax.step import TrainState, make_step
    from l2m_jax.tokens import make_layout

    config = load_preset("small")
    frames = codes // config.model.codebooks
    attention_width = config.model.attention_width if attention_width is None else attention_width
    model = dataclasses.replace(config.model, frames=frames, memory=LYRICS, attention_width=attention_width)
    config = dataclasses.replace(config, model=model)
    layout, rng = make_layout(config.model), np.random.default_rng(0)
    song = layout.encode(rng.integers(0, layout.entries, (frames, layout.codebooks)))
    states, row = rng.normal(size=(LYRICS, config.model.text_width)), np.zeros(LYRICS, np.int32)
    example = Example(song.ids, song.targets, states.astype(np.float32), row + LYRIC, row, np.arange(LYRICS))
    batch = jax.tree.map(lambda x: jax.numpy.asarray(x)[None], example)

    def init() -> TrainState:
        model: Any = SoundTransformer(config.model, rngs=nnx.Rngs(0))
        return TrainState(model, optimizer(config.train).init(model))

    state = jax.block_until_ready(jax.jit(init)())
    ready = time.perf_counter()
    step = jax.jit(make_step(config, layout), donate_argnums=0).lower(state, jax.numpy.array(0), batch).compile()
    found = {"startup_s": ready - began, "compile_s": time.perf_counter() - ready}
    times = []
    for i in range(steps + 1):
        began = time.perf_counter()
        state, metrics = step(state, jax.numpy.array(i), batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - began)
        assert np.isfinite(loss)
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return found | {"step_s": statistics.median(times[1:]), "peak_mib": peak / 1024}


def child(*command: object) -> dict[str, float]:
    """The last line of a process, read as JSON."""
    done = subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(job: Bench) -> None:
    """Everything, in turn."""
    if job.codes:
        print(json.dumps(train(job.codes, job.steps, job.attention_width)))
        return
    lengths = CODES[:2] if job.short else CODES
    full, found = lengths[-1], dict[str, list[float]]()

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"{name}: {value:.4g}", flush=True)

    for _ in range(1 if job.short else job.rounds):
        for codes in lengths:
            ours = child(__file__, "--codes", codes, "--steps", job.steps, "--attention-width", job.attention_width)
            for name, value in ours.items():
                note(f"{name}_{codes}", value)
        note("codes_per_s", full / ours["step_s"])
        if job.yardstick:
            theirs = child(job.yardstick / "seed_torch.py", "train", "--tokens", full, "--steps", job.steps)
            note("yardstick_codes_per_s", theirs["tokens_per_s"])
            note("yardstick_peak_mib", theirs["peak_mib"])
            note("speed_ratio", found["codes_per_s"][-1] / theirs["tokens_per_s"])
            note("memory_ratio", ours["peak_mib"] / theirs["peak_mib"])
        if not job.short:
            note("memory_growth_4500_to_18000", ours["peak_mib"] / found["peak_mib_4500"][-1])
    print(json.dumps({name: round(statistics.median(values), 4) for name, values in found.items()}))


if __name__ == "__main__":
    main(tyro.cli(Bench))
