"""From lyrics and a genre to a song on disk. After `train`, before `evaluate`; the decode loop itself is `sample`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from l2m_jax.audio import write_atomic, write_wav
from l2m_jax.checkpoint import RunInfo, load_model
from l2m_jax.codec import Codec, decode
from l2m_jax.config import SampleConfig, UserError, check_seed
from l2m_jax.data import prompt_rows
from l2m_jax.ecdc import read_ecdc, write_ecdc
from l2m_jax.encoders import Encoders, signature
from l2m_jax.lyrics import (
    TextEncoder,
    check_memory,
    encode_genre,
    encode_text,
    normalise_genre,
    parse_lyrics,
    split_pieces,
    unknown_warning,
)
from l2m_jax.model import Prompt, SoundTransformer
from l2m_jax.sample import Song, finished, sample_states
from l2m_jax.tokens import Layout, make_layout
from l2m_jax.weights import load_codec


@dataclasses.dataclass(frozen=True)
class Singer:
    """A trained model with the codec and the text encoder that it was trained with."""

    run: Path
    step: int
    info: RunInfo
    model: SoundTransformer
    layout: Layout
    codec: Codec
    encoder: TextEncoder

    @property
    def longest(self) -> float:
        """Seconds of the window."""
        return self.layout.frames / self.codec.frame_rate


def load_singer(run: Path, step: int | None = None, codec: str = "", text_encoder: str = "") -> Singer:
    """The newest (or given) checkpoint of a run; UserError where codec or text encoder are not those it learnt with."""
    model, info, step = load_model(run, step)
    made = info.made_with
    encoders = Encoders(codec or made.codec, made.codebooks, text_encoder or made.text_encoder, made.text_layer)
    encoders = encoders._replace(text_backend=made.text_backend)  # codes of torch's codec are ours: the weights are
    loaded = load_codec(encoders.codec, encoders.codebooks), encoders.load_text_encoder()
    if apart := made.differences(signature(encoders, *loaded)):
        raise UserError(f"{run} was trained with another origin of codes or states ({'; '.join(apart)})")
    return Singer(run, step, info, model, make_layout(info.config.model), *loaded)


def make_prompt(singer: Singer, lyrics: str, genre: str) -> tuple[Prompt, list[str]]:
    """The prompt of one song, [1, S, ...], and warnings. UserError where the lyrics are empty or beyond the cap."""
    parsed = parse_lyrics(lyrics)
    warnings = list(parsed.warnings)
    genre = normalise_genre(genre)
    if genre and genre not in singer.info.genres:
        known = ", ".join(singer.info.genres) or "none"
        warnings.append(
            f"genre {genre!r} was in no training song (those were: {known}); its words are used as they are"
        )
    cap, genre_states = singer.info.config.model.memory, encode_genre(singer.encoder, genre)
    pieces = split_pieces(singer.encoder, parsed)
    check_memory(len(pieces.ids), len(genre_states), cap, "the lyrics")
    warnings += unknown_warning(singer.encoder, pieces, "the lyrics")
    text = encode_text(singer.encoder, parsed)
    rows = prompt_rows(text.states, text.section, genre_states, cap)
    return Prompt(*(row[None] for row in rows)), warnings


def sing(
    singer: Singer,
    prompts: list[Prompt],
    rule: SampleConfig,
    seeds: list[int],
    seconds: float,
    progress: Callable[[float], Any] = lambda done: None,
) -> list[Song]:
    """Codes of the prompts, sampled as one batch; `progress` is told the seconds sung so far.

    UserError where `seconds` is not above 0 or beyond the model's window.
    """
    if not 0 < seconds <= singer.longest:
        raise UserError(
            f"the length limit is {seconds:g} s; allowed: above 0, up to the window of {singer.longest:g} s"
        )
    frames = max(round(seconds * singer.codec.frame_rate), 1)
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *prompts)
    state = None
    for state in sample_states(singer.model, singer.layout, together, rule, seeds, frames):
        share = min(int(state.position) / singer.layout.length(frames), 1.0)
        progress(round(share * seconds, 1))
    assert state is not None  # frames > 0
    return finished(state, singer.layout, frames)


def generate(
    singer: Singer,
    lyrics: str,
    genre: str,
    out: Path,
    rule: SampleConfig,
    seed: int = 0,
    seconds: float | None = None,
    progress: Callable[[float], Any] = lambda done: None,
) -> dict[str, Any]:
    """Sings a song and writes OUT.wav, .ecdc, .npz and .json (each whole or not at all); returns what .json says."""
    check_output(out)
    check_seed("seed", seed)
    began = time.perf_counter()
    prompt, warnings = make_prompt(singer, lyrics, genre)
    limit = singer.longest if seconds is None else seconds
    song = sing(singer, [prompt], rule, [seed], limit, progress)[0]
    sampled = time.perf_counter()
    samples = decode(singer.codec, song.codes)
    decoded = time.perf_counter()
    write_song(out, song.codes, samples, singer.codec)
    about = {
        "lyrics": lyrics,
        "genre": genre,
        "seed": seed,
        "sampling": dataclasses.asdict(rule),
        "limit_s": limit,
        "seconds": round(len(samples) / singer.codec.rate, 3),
        "ended_by_itself": song.ended,
        "nats_per_code": -song.logprob / max(song.codes.size, 1),
        "cut": None if song.ended else f"the song had not ended at the limit of {limit:g} s",
        "warnings": warnings,
        "run": str(singer.run),
        "step": singer.step,
        "made_with": singer.info.made_with._asdict(),
        "codes_sha256": hashlib.sha256(song.codes.astype("<i4").tobytes()).hexdigest(),
        "timings_s": {"sampling": round(sampled - began, 3), "decoding": round(decoded - sampled, 3)},
    }
    write_atomic(out.with_suffix(".json"), (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
    return about


def check_output(out: Path) -> None:
    """UserError where `out` is no .wav or its folder cannot be written; before the long work, not after."""
    if out.suffix.lower() != ".wav":
        raise UserError(f"{out}: the output must end in .wav")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.parent / f".{out.name}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}") from None


def write_song(out: Path, codes: Int[np.ndarray, "F K"], samples: Float[np.ndarray, " T"], codec: Codec) -> None:
    """OUT.wav, OUT.ecdc and OUT.npz."""
    write_wav(out, samples, codec.rate)
    write_ecdc(out.with_suffix(".ecdc"), codes, len(samples), codec)
    content = io.BytesIO()
    np.savez(content, codes=codes.astype(np.int16), codec=codec.name, fingerprint=codec.fingerprint)
    write_atomic(out.with_suffix(".npz"), content.getvalue())


def decode_file(path: Path, out: Path, codec_name: str = "solfege") -> float:
    """Turns a .ecdc or .npz into a WAV; returns its seconds. UserError where it is damaged or of another codec."""
    check_output(out)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    length = None
    if path.suffix.lower() == ".ecdc":
        codec = load_codec(codec_name)
        codes, length = read_ecdc(path, codec)
        codec = codec if codes.shape[1] == codec.codebooks else load_codec(codec_name, codes.shape[1])
    elif path.suffix.lower() == ".npz":
        codes, name, fingerprint = _read_npz(path)
        codec = load_codec(codec_name, codes.shape[1])
        if fingerprint != codec.fingerprint:
            raise UserError(f"{path} has codes of {name} [{fingerprint}], not of {codec.name}: name it with --codec")
    else:
        raise UserError(f"{path}: a .ecdc or a .npz is needed")
    samples = decode(codec, codes)[:length]
    write_wav(out, samples, codec.rate)
    return len(samples) / codec.rate


def _read_npz(path: Path) -> tuple[np.ndarray, str, str]:
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            codes = arrays["codes"].astype(np.int32)
            if codes.ndim != 2:
                raise ValueError(f"codes of shape {codes.shape}, not [frames, codebooks]")
            return codes, str(arrays["codec"]), str(arrays["fingerprint"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or holds no codes ({error})") from None
