"""How fast does `small` sing? Beside the yardsticks and the speed at which this machine copies memory.

    python scripts/bench_generate.py [--yardsticks DIR] [--short]

DIR holds seed_torch.py and hf_musicgen.py, which are run in turn with our own loop; the latter ran with transformers
5.17, and neither with 5.12 nor with 5.24. Random weights, 256 lyric states, no guidance, top-k 250 (as the MusicGen
yardstick): speed does not hang on what was learnt. Figures are medians over the rounds; compilation is timed apart. A
code is one of K = 2 a frame. Prints one JSON line last:

    rtf_120s_delay        seconds of computing a second of sound: 120 s in `delay`, decoded and written as WAV
    ratio_cat, _static    codes/s over the yardstick with a grown, a preallocated cache; `flatten`, at 16,000 codes
    ratio_musicgen        codes/s over that of MusicGen's decoder, 1,500 frames in `delay`
    share_of_limit_16000  bytes a step has to read (weights, lyric keys and values, the cache so far) each second, over
                          bytes read and written each second by copying as much memory, by one thread or two
    full_share_of_limit_16000  the same of `small` with attention in the yardstick's shape: as wide as the model, a key
                          head a head, which reads 8 times the cache
    over_full_limit_16000 codes/s of `small` as it is, over what that limit allows the full shape: how far fewer bytes
                          take it past the limit
    first_sound_s         a new process with compiled programs in the cache: from a loaded model and lyric states to the
                          first second of samples; first_sound_process_s: from its start, imports and model included
    memory                peak of the loop's growth over weights and cache, up to the whole window of `flatten`; the
                          programs of every size were loaded before, and freed memory handed back
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from flax import nnx  # noqa: E402

from l2m_jax import sample  # noqa: E402
from l2m_jax.audio import write_wav  # noqa: E402
from l2m_jax.cli import load_preset  # noqa: E402
from l2m_jax.codec import decode, decode_chunk, decoder_state  # noqa: E402
from l2m_jax.config import ModelConfig, SampleConfig  # noqa: E402
from l2m_jax.model import LYRIC, Prompt, SoundTransformer  # noqa: E402
from l2m_jax.tokens import make_layout  # noqa: E402
from l2m_jax.weights import load_codec  # noqa: E402

RULE = SampleConfig(temperature=1.0, top_k=250, guidance_lyrics=1.0, guidance_genre=1.0)
SMALL = load_preset("small").model
FULL = dataclasses.replace(SMALL, attention_width=SMALL.width, key_heads=SMALL.heads)
LYRICS = 256  # states, as the yardsticks have


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure generation."""

    yardsticks: Path | None = None
    """Folder of seed_torch.py and hf_musicgen.py."""
    rounds: int = 5
    """Times that everything is measured, in turn."""
    steps: int = 100
    """Codes a round, at each length of the cache."""
    short: bool = False
    """One round of few codes and 12 s instead of 120 s, while developing."""
    job: Literal["all", "first-sound", "memory"] = "all"
    """What the processes that this one starts do."""


def make(layout: Literal["flatten", "delay"], small: ModelConfig = SMALL) -> tuple[SoundTransformer, Any, Prompt]:
    """A random `small` of this layout, its layout, and lyrics of random states."""
    config = dataclasses.replace(small, layout=layout)
    model = jax.block_until_ready(jax.jit(lambda: SoundTransformer(config, rngs=nnx.Rngs(0)))()).unstacked()
    row = np.zeros((1, LYRICS), np.int32)
    states = np.random.default_rng(0).normal(size=(1, LYRICS, config.text_width)).astype(np.float32)
    return model, make_layout(config), Prompt(states, row + LYRIC, row, np.arange(LYRICS)[None])


class Loop:
    """The compiled loop of one song that has `at` codes in its cache; what they are is left random."""

    def __init__(self, layout_name: Literal["flatten", "delay"], at: int, small: ModelConfig = SMALL):
        self.model, self.layout, prompt = make(layout_name, small)
        none = np.zeros((0, self.layout.codebooks), np.int32)
        most = self.layout.frames
        self.context = sample._start(self.model, self.layout, prompt, RULE, [0], [most], [most], [none])
        self.at = at // self.layout.streams
        size = sample.cache_size(self.at + 1, self.layout)
        self.cache = sample.empty_cache(self.model, self.context, size)
        self.state = sample.SampleState(
            position=jnp.array(self.at),
            heard=jnp.zeros_like(self.context.given[:, 0]),
            said=jnp.zeros_like(self.context.given),
            end=jnp.array([most + 1]),
            logprob=jnp.zeros(1),
        )
        began = time.perf_counter()
        self.run(0)
        self.compile_s = time.perf_counter() - began

    def run(self, steps: int) -> float:
        """Codes a second over so many positions."""
        began = time.perf_counter()
        state = self.state._replace(position=jnp.array(self.at))
        state, self.cache = sample._segment(
            self.model, self.context, state, self.cache, jnp.array(self.at + steps), self.layout, 0
        )
        jax.block_until_ready(state.position)
        return steps * self.layout.streams / (time.perf_counter() - began)

    def bytes_a_step(self) -> int:
        """What a step has to read: weights, lyric keys and values, and the cache up to its position."""
        layers = [
            (x.cross_attention.query, x.cross_attention.out, x.self_attention, x.up, x.down) for x in self.model.layers
        ]
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves((layers, self.model.head, self.context.lyrics)))
        return weights + sum(leaf[..., :1].nbytes * self.at for leaf in jax.tree.leaves(self.cache))


def copy_speed(size: int) -> float:
    """Bytes read and written a second when `size` bytes are copied: medians, by one thread or by one a core."""
    source, target = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)
    speeds: dict[int, list[float]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for threads in (1, os.cpu_count() or 1) * 7:
            parts = list(zip(np.array_split(target, threads), np.array_split(source, threads)))
            began = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            speeds.setdefault(threads, []).append(2 * source.nbytes / (time.perf_counter() - began))
    return max(map(statistics.median, speeds.values()))


def yardstick(folder: Path | None, script: str, *arguments: object) -> float:
    """Codes a second of a yardstick."""
    command = [sys.executable, f"{folder}/{script}", *map(str, arguments)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return result.get("tokens_per_s") or result["codes_per_s"]


def whole_songs(frames: int, rounds: int) -> Iterator[dict[str, float]]:
    """Songs in `delay` to WAV: a cold one that compiles, then warm ones of other seeds."""
    model, layout, prompt = make("delay")
    codec, seconds = load_codec(), frames / load_codec().frame_rate
    for seed in range(rounds + 1):
        began = time.perf_counter()
        *_, state = sample.sample_states(model, layout, prompt, RULE, [seed], frames, frames)
        song = sample.said(state, layout, frames)[0]
        sampled = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            write_wav(Path(folder) / "song.wav", decode(codec, song.codes), codec.rate)
        name, decoded = "warm" if seed else "cold", time.perf_counter()
        yield {f"{name}_sampling_s": sampled - began, f"{name}_decoding_s": decoded - sampled}
        if seed:
            yield {"rtf": (decoded - began) / seconds}


def first_sound() -> dict[str, float]:
    """Run in a new process: seconds to the first second of samples."""
    imported = time.perf_counter()
    model, layout, prompt = make("delay")
    codec = load_codec()
    loaded = time.perf_counter()
    state = next(sample.sample_states(model, layout, prompt, RULE, [0], layout.frames))
    codes = sample.said(state, layout, layout.frames)[0].codes
    samples = decode_chunk(codec, decoder_state(codec), codes)[1]
    assert len(samples) >= 0.95 * codec.rate
    done = time.perf_counter()
    return {
        "process": done - STARTED,
        "imports": imported - STARTED,
        "model": loaded - imported,
        "sound": done - loaded,
    }


def memory() -> dict[str, float]:
    """Run in a new process: the peak while the cache grows to its end, and the bytes of weights and cache."""

    def resident(name: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def walk(loop: Loop) -> None:
        """To the end of the window."""
        while loop.cache[0].keys.shape[-1] < loop.layout.positions:
            loop.at = loop.cache[0].keys.shape[-1] + 1
            sample.grow(loop.cache, sample.cache_size(loop.at + 2, loop.layout))
            loop.run(2)

    walk(Loop("flatten", 14_000))  # loads the programs of every size
    loop = Loop("flatten", 14_000)
    loop.run(2)
    sample.trim()
    base = resident("VmRSS") - live()  # Python, JAX and compiled programs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    walk(loop)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves((loop.model, loop.cache)))
    return {"peak": resident("VmHWM") - base, "weights_and_cache": needed}


def child(job: str, folder: str) -> dict[str, float]:
    """A job of this script in a process of its own, its compiled programs in `folder`."""
    command = [sys.executable, __file__, "--job", job]
    keep = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | keep)
    return json.loads(result.stdout.splitlines()[-1])


def main(job: Bench) -> None:
    """Everything, in turn."""
    if job.job != "all":
        print(json.dumps(first_sound() if job.job == "first-sound" else memory()))
        return
    rounds, steps = (1, 20) if job.short else (job.rounds, job.steps)
    kinds = ("cat", "static") if job.yardsticks else ()
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"{name}: {value:.4g}", flush=True)

    loops = {at: Loop("flatten", at) for at in (0, 4000, 16_000)}
    for at, loop in loops.items():
        note(f"compile_s_{at}", loop.compile_s)
    full = Loop("flatten", 16_000, FULL)
    for _ in range(rounds):
        for at, loop in loops.items():
            codes = loop.run(steps)
            note(f"codes_per_s_{at}", codes)
            speed = copy_speed(loop.bytes_a_step())
            note(f"copy_gb_per_s_{at}", speed / 1e9)
            note(f"share_of_limit_{at}", codes * loop.bytes_a_step() / speed)
            for kind in kinds:
                theirs = yardstick(
                    job.yardsticks, "seed_torch.py", "generate", "--tokens", steps, "--start", at, "--cache", kind
                )
                note(f"{kind}_codes_per_s_{at}", theirs)
                note(f"ratio_{kind}_{at}", codes / theirs)
        theirs, speed = full.run(steps), copy_speed(full.bytes_a_step())
        note("full_codes_per_s_16000", theirs)
        note("full_copy_gb_per_s_16000", speed / 1e9)
        note("full_share_of_limit_16000", theirs * full.bytes_a_step() / speed)
        note("over_full_limit_16000", found["codes_per_s_16000"][-1] * full.bytes_a_step() / speed)
    del loops, full
    frames = 150 if job.short else 1500
    model, layout, prompt = make("delay")
    for seed in range(rounds + 1):
        began = time.perf_counter()
        *_, state = sample.sample_states(model, layout, prompt, RULE, [seed], frames, frames)
        jax.block_until_ready(state)
        if seed == 0:  # compiles
            continue
        ours = frames * layout.codebooks / (time.perf_counter() - began)
        note("delay_codes_per_s", ours)
        if job.yardsticks:
            theirs = yardstick(job.yardsticks, "hf_musicgen.py", "--frames", frames)
            note("musicgen_codes_per_s", theirs)
            note("ratio_musicgen", ours / theirs)
    del model
    for figures in whole_songs(900 if job.short else 9000, rounds):
        for name, seconds in figures.items():
            note(f"{name}_{12 if job.short else 120}s_delay", seconds)
    with tempfile.TemporaryDirectory() as folder:
        for name in ["cold"] + ["warm"] * rounds:
            for part, seconds in child("first-sound", folder).items():
                note(f"first_{part}_{name}_s", seconds)
        child("memory", folder)  # compiles
        for name, value in child("memory", folder).items():
            note(f"memory_{name}_mib", value / 2**20)
    median = {name: round(statistics.median(values), 4) for name, values in found.items()}
    median["memory"] = round(median["memory_peak_mib"] / median["memory_weights_and_cache_mib"], 3)
    median |= {"first_sound_s": median["first_sound_warm_s"], "first_sound_process_s": median["first_process_warm_s"]}
    for kind in kinds:
        median[f"ratio_{kind}"] = median[f"ratio_{kind}_16000"]
    print(json.dumps(median))


if __name__ == "__main__":
    main(tyro.cli(Bench))
