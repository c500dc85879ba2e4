"""What is in a prepared dataset, told in words, a picture and sound: `l2m inspect`. After `picture`.

The songs are read one after the other; nothing but counts is kept. Letters: F frames, K codebooks, V entries, P pieces.
"""

from __future__ import annotations

import collections
import difflib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from l2m_jax.audio import to_mono, write_wav
from l2m_jax.codec import decode
from l2m_jax.config import UserError
from l2m_jax.data import Dataset, MadeWith, Record, read_manifest
from l2m_jax.encoders import Encoders
from l2m_jax.lyrics import SECTIONS, normalise_genre, parse_lyrics, split_pieces, windows
from l2m_jax.picture import Label, draw_song
from l2m_jax.weights import load_codec

MOST = 12  # lines of a list; the others are counted


def describe(dataset: Dataset) -> list[str]:
    """Lines on the whole dataset: what it was made with, counts, genres, scripts, lengths, codebooks, what is left out.

    UserError where a song cannot be read.
    """
    made = dataset.made_with
    seconds, pieces = np.zeros(len(dataset)), np.zeros(len(dataset), np.int64)
    genres, scripts = collections.Counter[str](), collections.Counter[str]()
    used, timed = np.zeros((made.codebooks, made.entries), np.int64), 0
    for i in range(len(dataset)):
        record = dataset[i]
        seconds[i], pieces[i] = record.seconds, len(record.lyric_states)
        genres[normalise_genre(record.genre) or "(none)"] += 1
        scripts[main_script(record.lyrics)] += 1
        used += count_codes(record.codes, made.entries)
        timed += len(record.word_times) > 0
    return [
        f"{dataset.folder}: {len(dataset)} songs, {seconds.sum() / 3600:.3g} hours, {timed} with word times",
        f"codec: {made.codec} [{made.codec_fingerprint}], {made.codebooks} codebooks of {made.entries} entries",
        f"text encoder: {made.text_encoder}, layer {made.text_layer} [{made.text_fingerprint}], {made.text_width} wide",
        *_counted("genres", genres),
        *_counted("scripts of the lyrics", scripts),
        *_histogram("seconds", seconds),
        *_histogram("lyric pieces", pieces),
        *codebook_use(used),
        *_left_out(dataset.folder),
    ]


def find_song(dataset: Dataset, name: str) -> Record:
    """The song of that name; UserError names those that are nearest where there is none."""
    names = [line["song"] for line in read_manifest(dataset.folder)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.3) or names[:3]
        raise UserError(f"{dataset.folder} has no song {name!r}; nearest: {', '.join(near)}")
    return dataset[names.index(name)]


def describe_song(record: Record, made: MadeWith, text_encoder: str = "") -> list[str]:
    """Lines on one song: its lyrics in the pieces, sections and windows that the model will see, and its codes.

    UserError where the text encoder is not the one that the song was prepared with.
    """
    encoders = Encoders(text_encoder=text_encoder or made.text_encoder, text_layer=made.text_layer)
    encoder = encoders._replace(text_backend=made.text_backend).load_text_encoder()
    if encoder.fingerprint != made.text_fingerprint:
        raise UserError(
            f"{record.song} was prepared with text encoder {made.text_encoder} [{made.text_fingerprint}], this is"
            f" {encoder.name} [{encoder.fingerprint}]: name the other with --text-encoder"
        )
    lyrics = parse_lyrics(record.lyrics)
    pieces = split_pieces(encoder, lyrics)
    frames, codebooks = record.codes.shape
    spans = list(windows(int(np.sum(pieces.ids >= 0)), encoder.positions - 2))
    lines = [
        f"{record.song}: {record.seconds:.1f} s, genre {record.genre or '(none)'}, {len(lyrics.words)} words,"
        f" {len(record.word_times)} of them with times, source {record.source}",
        f"memory: {len(record.genre_states)} genre rows, {len(record.lyric_states)} lyric rows of {made.text_width}",
        f"windows of {encoder.positions} positions: {len(spans)}"
        + "".join(f"; pieces {first} to {end - 1}" for _, first, end in spans if len(spans) > 1),
    ]
    # A line for each line of the lyrics, and for each tag without words.
    lines_of = [lyrics.lines[word] if word >= 0 else -1 - row for row, word in enumerate(pieces.word)]
    names = [str(encoder.tokenizer.id_to_token(int(i))) if i >= 0 else "-" for i in pieces.ids]
    for _, group in itertools.groupby(range(len(names)), key=lambda row: lines_of[row]):
        rows = list(group)
        lines.append(f"  [{SECTIONS[pieces.section[rows[0]]]}] {' '.join(names[row] for row in rows)}")
    lines.append(f"codes: {frames} frames of {codebooks}, at {frames / float(record.seconds):.1f} frames/s")
    lines += codebook_use(count_codes(record.codes, made.entries))
    lines += [f"  first of codebook {k}: {' '.join(map(str, record.codes[:16, k]))}" for k in range(codebooks)]
    return lines


def draw_record(record: Record, made: MadeWith, out: Path, codec_name: str = "") -> list[Path]:
    """Writes SONG.wav, decoded from the codes, and SONG.png; returns their paths.

    UserError where the codec is not the one that the song was prepared with, or `out` cannot be written.
    """
    codec = load_codec(codec_name or made.codec, made.codebooks)
    if codec.fingerprint != made.codec_fingerprint:
        raise UserError(
            f"{record.song} has codes of {made.codec} [{made.codec_fingerprint}], this is {codec.name}"
            f" [{codec.fingerprint}]: name the other with --codec"
        )
    wav, png = out / f"{record.song}.wav", out / f"{record.song}.png"
    samples = decode(codec, record.codes)
    write_wav(wav, samples, codec.rate)
    words = parse_lyrics(record.lyrics).words
    times = [Label(word, float(row[0]), float(row[1])) for word, row in zip(words, record.word_times)]
    rows: dict[str, Sequence[Label]] = {"words": times} if times else {}
    draw_song(png, to_mono(samples), codec.rate, record.lyrics, rows, f"{record.song}, from its codes")
    return [wav, png]


def main_script(text: str) -> str:
    """Unicode script of most of the letters, section tags apart: Latin, Cyrillic, Han, Hangul ...; (none) without any.

    Japanese, which mixes three, is told by its kana.
    """
    sung = " ".join(line for line in text.splitlines() if not line.lstrip().startswith("["))
    letters = (letter for letter in unicodedata.normalize("NFKC", sung) if letter.isalpha())
    # A letter's name begins with that of its script: LATIN SMALL LETTER A, CJK UNIFIED IDEOGRAPH-6708.
    found = collections.Counter(re.split(r"[ -]", unicodedata.name(letter, "OTHER"))[0] for letter in letters)
    if found["HIRAGANA"] + found["KATAKANA"] > 0.1 * found.total():
        return "Japanese"
    main = found.most_common(1)[0][0].capitalize() if found else "(none)"
    return {"Cjk": "Han"}.get(main, main)


def count_codes(codes: Int[np.ndarray, "F K"], entries: int) -> Int[np.ndarray, "K V"]:
    """How often each entry of each codebook stands in the codes."""
    return np.stack([np.bincount(column, minlength=entries) for column in codes.T])


def codebook_use(counts: Int[np.ndarray, "K V"]) -> list[str]:
    """A line a codebook: entries that are used at all, and the entropy of their use in bits."""
    lines = []
    for k, row in enumerate(counts):
        shares = row[row > 0] / max(row.sum(), 1)
        entropy = abs(float(-np.sum(shares * np.log2(shares))))
        most = np.log2(len(row))
        lines.append(
            f"codebook {k}: {len(shares)} of {len(row)} entries used, entropy {entropy:.2f} of {most:.2f} bits"
        )
    return lines


def _counted(title: str, counts: collections.Counter[str]) -> list[str]:
    shown = [f"{name} {count}" for name, count in counts.most_common(MOST)]
    rest = [f"and {len(counts) - MOST} more"] if len(counts) > MOST else []
    return [f"{title}: {', '.join([*shown, *rest])}"]


def _histogram(title: str, values: np.ndarray) -> list[str]:
    whole = values.dtype.kind == "i"  # bins of whole numbers are [low, high) with whole bounds
    edges = np.linspace(values.min(), values.max() + whole, 9)
    edges = np.unique(edges.astype(int) if whole else edges)
    counts, edges = np.histogram(values, edges if len(edges) > 1 else 1)
    bars = ["#" * -(-40 * int(count) // int(counts.max())) for count in counts]
    rows = [f"  from {low:<8.4g} {count:8d} {bar}".rstrip() for low, count, bar in zip(edges, counts, bars)]
    return [f"{title}: {values.min():.4g} to {values.max():.4g}, median {np.median(values):.4g}", *rows]


def _left_out(folder: Path) -> list[str]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        left_out, warnings, gone = report["left_out"], report["warnings"], report["gone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"left out: not known; {folder / 'report.json'} cannot be read ({error}): run l2m prepare again"]
    lines = [f"left out: {len(left_out)}", *_some(f"{bad['id']}: {bad['reason']}" for bad in left_out)]
    lines += [f"not packed, for their folders are gone: {len(gone)}", *_some(gone)] if gone else []
    lines += [f"warnings: {len(warnings)}", *_some(warnings)] if warnings else []
    return lines


def _some(items: Iterable[str]) -> list[str]:
    items = list(items)
    rest = [f"  and {len(items) - MOST} more, in report.json"] if len(items) > MOST else []
    return [f"  {item}" for item in items[:MOST]] + rest
