"""Our codec against transformers' on CPU: python scripts/bench_codec.py [--seconds 60] [--repeats 5]; extra `torch`.

Both encode and decode the same sound in turn, in one process, for the shipped codec and for encodec_24khz at full size
(random weights; speed does not depend on them). Times are medians, without compilation. Then a process of its own
takes a song of 200 s through the full-size codec, and says how much memory it had at its highest. Progress on stderr;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from l2m_jax.codec import Codec, decode, encode
from l2m_jax.encodec import PUBLISHED, Encodec
from l2m_jax.weights import load_codec, resolve

SONG = 200  # seconds of the song whose memory is taken


def main() -> None:
    """Measures, and prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="length of the sound")
    parser.add_argument("--repeats", type=int, default=5, help="times that each does it")
    parser.add_argument("--peak", action="store_true", help="only a whole song; prints the highest memory in MiB")
    arguments = parser.parse_args()
    if arguments.peak:
        codec = full_size()
        decode(codec, encode(codec, sound(SONG, codec.rate)))
        # Not ru_maxrss, which a process inherits from the one that starts it.
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return
    from transformers import EncodecConfig, EncodecModel

    pairs: dict[str, tuple[Codec, Any]] = {
        "solfege": (load_codec(), EncodecModel.from_pretrained(resolve("solfege")[1])),
        "encodec_24khz": (full_size(), EncodecModel(EncodecConfig())),
    }
    measured = {name: compare(name, *pair, arguments.seconds, arguments.repeats) for name, pair in pairs.items()}
    say(f"memory of a song of {SONG} s")
    peak = subprocess.run([sys.executable, __file__, "--peak"], check=True, capture_output=True, text=True).stdout
    lowest = {key: min(codec[key] for codec in measured.values()) for key in ("encode_ratio", "decode_ratio")}
    print(json.dumps(lowest | {"peak_mib": round(float(peak)), "seconds": arguments.seconds, "codecs": measured}))


def full_size() -> Codec:
    """encodec_24khz with random weights, 2 codebooks."""
    config = PUBLISHED["encodec_24khz"]
    return Codec("encodec_24khz", "", config, Encodec(config, 2, nnx.Rngs(0)))


def compare(name: str, codec: Codec, original: Any, seconds: float, repeats: int) -> dict[str, float]:
    """Seconds of each, and how many times ours is as fast; ours and the original in turn."""
    import torch

    samples = sound(seconds, codec.rate)
    given = torch.from_numpy(samples)[None, None]
    codes = encode(codec, samples)
    theirs = torch.from_numpy(codes.T[None, None]).long()
    original = original.eval()
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(codec, samples),
        "encode_transformers": lambda: original.encode(given, bandwidth=original.config.target_bandwidths[0]),
        "decode": lambda: decode(codec, codes),
        "decode_transformers": lambda: original.decode(theirs, [None]),
    }
    times: dict[str, list[float]] = {key: [] for key in works}
    with torch.inference_mode():
        for turn in range(repeats + 1):  # the first one compiles
            for key, work in works.items():
                began = time.perf_counter()
                work()
                times[key].append(time.perf_counter() - began)
            say(f"{name}, turn {turn} of {repeats}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()))
    medians = {key: statistics.median(values[1:]) for key, values in times.items()}
    ratios = {f"{key}_ratio": medians[f"{key}_transformers"] / medians[key] for key in ("encode", "decode")}
    return {key: round(value, 3) for key, value in (medians | ratios).items()}


def sound(seconds: float, rate: int) -> np.ndarray:
    """Noise and a tune, float32."""
    at = np.arange(int(seconds * rate)) / rate
    tune = 0.3 * np.sin(2 * np.pi * 220 * 2 ** (np.floor(4 * at) % 12 / 12) * at)
    return (tune + np.random.default_rng(0).normal(0, 0.03, len(at))).astype(np.float32)


def say(text: str) -> None:
    """On stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
