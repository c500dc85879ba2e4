"""Which words a speech recogniser hears in songs, and its error rates by `jiwer`. After `lyrics`.

Needs the extras `torch` and `eval`, and a model: a folder, or an id of the hub. What the rates are worth is the
recogniser's affair: beside a song's stands that of the codec's reconstruction of the true one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
from jaxtyping import Float

from l2m_jax.config import UserError
from l2m_jax.lyrics import parse_lyrics

NORMALISATION = "NFKC, case folded, only letters, digits and apostrophes kept, section tags left out"
CHUNK = 30  # seconds that the recogniser hears at a time


class Recogniser(NamedTuple):
    """A speech recogniser of transformers."""

    name: str
    revision: str
    """Commit of the hub; empty of a folder that knows none."""
    phonemes: bool
    """Whether it writes phonemes, not words."""
    pipeline: Any


def load_recogniser(name: str) -> Recogniser:
    """The model of a folder or a hub id. UserError where an extra is missing, or it is no recogniser."""
    try:
        import jiwer  # noqa: F401 - said now, not after the singing
        from transformers import pipeline
    except ModuleNotFoundError as error:
        raise UserError(f"--asr needs the extras torch and eval: pip install -e '.[torch,eval]' ({error})") from None
    try:
        loaded: Any = pipeline("automatic-speech-recognition", model=name)
        phonemes = "Phoneme" in type(loaded.tokenizer).__name__
        return Recogniser(name, _revision(name), phonemes, loaded)
    except Exception as error:  # whatever transformers and the hub say of it
        reason = str(error).partition("\n")[0]
        raise UserError(f"--asr {name}: no speech recogniser can be loaded ({reason})") from None


def _revision(name: str) -> str:
    """The commit of what the hub has sent, which no longer stands in the config of a model; "" of a folder."""
    from huggingface_hub import try_to_load_from_cache  # here: the command line must answer without a network library

    found = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else ""


def transcribe(recogniser: Recogniser, samples: Float[np.ndarray, " T"], rate: int) -> str:
    """What it hears in a mono song."""
    wanted = recogniser.pipeline.feature_extractor.sampling_rate
    sound = soxr.resample(samples, rate, wanted)
    sound = np.pad(sound, (0, max(wanted - len(sound), 0)))  # convolutions of less than a second may leave no frame
    long = {"chunk_length_s": CHUNK} if len(sound) > CHUNK * wanted else {}
    return recogniser.pipeline({"raw": sound, "sampling_rate": wanted}, **long)["text"]


def normalise(text: str) -> str:
    """Words as they are compared; see NORMALISATION."""
    kept = (c if unicodedata.category(c)[0] in "LMN" or c in "'’" else " " for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(kept).replace("’", "'").casefold().split())


def error_rates(recogniser: Recogniser, lyrics: Sequence[str], heard: Sequence[str]) -> dict[str, Any]:
    """Word error rate over all songs, of what `transcribe` gave; of a model of phonemes the phoneme error rate.

    A recogniser of phonemes says how lyrics are pronounced: its tokenizer calls `phonemizer`. UserError without it.
    """
    import jiwer

    asked = [" ".join(parse_lyrics(text).words) for text in lyrics]
    protocol = {"model": recogniser.name, "revision": recogniser.revision, "normalisation": NORMALISATION}
    protocol |= {"seconds_at_a_time": CHUNK}
    if recogniser.phonemes:
        protocol["normalisation"] = "phonemes of the tokenizer's phonemizer, each counted as a word"
        try:
            said = [recogniser.pipeline.tokenizer.phonemize(text) for text in asked]
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"{recogniser.name} writes phonemes: pip install phonemizer, and espeak ({error})"
            ) from None
        heard_words = list(heard)
    else:
        said, heard_words = [normalise(text) for text in asked], [normalise(text) for text in heard]
    pairs = [(a, b) for a, b in zip(said, heard_words) if a]  # nothing is asked of an instrumental
    counts = jiwer.process_words([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
    rate = None if counts is None else counts.wer
    words = 0 if counts is None else counts.hits + counts.substitutions + counts.deletions
    unit = "phoneme" if recogniser.phonemes else "word"
    return {f"{unit}_error_rate": rate, f"{unit}s": words, "songs": len(pairs), "protocol": protocol}
