"""Does this accelerator compute what a CPU does, and how fast? One GPU or TPU chip; a CPU is compared with itself.

    python scripts/check_accelerator.py

Takes a minute or two, most of it compiling. Prints one JSON line last:

    train_codes_per_s   `small`, `flatten`, one song of 18,000 codes: codes over the median step
    train_peak_mib      the device's peak memory in that
    attention_error     causal attention of 18,432 positions in the model's type against float32, relative: the result,
                        and its gradients by queries, keys and values
    codes_differ        share of the codes of 20 s of mixed sound that are not those of a CPU
    waveform_error      largest difference of their decoded sound, over its largest sample
    sing_codes_per_s    the decode loop of `small`, one song, at 0 and at 16,000 codes in the cache
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_generate import Loop
from bench_train import train

from l2m_jax.attention import attention, platform
from l2m_jax.codec import decode, encode
from l2m_jax.sounds import make_clip
from l2m_jax.weights import load_codec

CODES = 18_000
DTYPE = jnp.float32 if platform() == "cpu" else jnp.bfloat16


def steps() -> dict[str, Any]:
    """Training, first: its peak is the peak so far."""
    found = train(CODES, 10, None)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {"train_codes_per_s": CODES / found["step_s"], "train_peak_mib": memory / 2**20}


def attending(positions: int = 18_432) -> dict[str, Any]:
    """The shape of a layer of `small`: four query heads, one key head, 64 wide."""
    drawn = [np.random.default_rng(i).normal(size=(1, heads, positions, 64)) for i, heads in enumerate((4, 1, 1))]
    weight = np.random.default_rng(3).normal(size=drawn[0].shape)

    def result(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(*qkv).astype(jnp.float32)
        return jnp.sum(out * weight), out

    run = jax.jit(jax.grad(result, (0, 1, 2), has_aux=True))
    with jax.default_matmul_precision("float32"):
        gradients, out = run(*(jnp.asarray(x, jnp.float32) for x in drawn))
    ours, our_out = run(*(jnp.asarray(x, DTYPE) for x in drawn))
    pairs = [(our_out, out), *zip(ours, gradients)]
    return {"attention_error": [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]}


def coding() -> dict[str, Any]:
    """The shipped codec, here and on a CPU."""
    codec, sound = load_codec(), make_clip(0, 0, 20.0, "mixture")
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = encode(codec, sound)
        heard = decode(codec, wanted)
    jax.clear_caches()
    return {
        "codes_differ": float(np.mean(encode(codec, sound) != wanted)),
        "waveform_error": float(np.abs(decode(codec, wanted) - heard).max() / np.abs(heard).max()),
    }


def singing() -> dict[str, Any]:
    """The decode loop."""
    loops = [Loop("flatten", at) for at in (0, 16_000)]
    return {"sing_codes_per_s": [max(loop.run(200) for _ in range(3)) for loop in loops]}


if __name__ == "__main__":
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for part in (steps, attending, coding, singing):
        found |= part()
        print(found, flush=True)
    print(json.dumps(found))
