"""Timestamps: the words of a song, real or generated, at their times, and song.lrc. After `align` and `singer`.

song.lrc is enhanced LRC, which players show while a song plays: a line at its time, each word at its own.

    # [chorus]
    [00:12.40] <00:12.40> la <00:12.95> luna
    [00:15.20]

The last line clears the one before: nothing is sung. RUN/alignment.json says how words are read from the attention.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from l2m_jax.align import Errors, Head, Reading, Teacher, align_song, choose_heads, memory_words, teacher
from l2m_jax.audio import write_atomic
from l2m_jax.config import UserError
from l2m_jax.data import Dataset
from l2m_jax.lyrics import parse_lyrics, split_pieces
from l2m_jax.picture import Label
from l2m_jax.singer import Singer, make_prompt
from l2m_jax.song import read_sound, write_json
from l2m_jax.songs import read_song


class Source(NamedTuple):
    """A song to be aligned."""

    codes: Int[np.ndarray, "F K"]
    lyrics: str
    genre: str
    sound: Path
    out: Path  # song.lrc, where no other place is named
    starts: Float[np.ndarray, " W"] | None  # of its words.csv, in s


class Kept(NamedTuple):
    """What RUN/alignment.json says."""

    reading: Reading
    step: int
    songs: str  # `Dataset.fingerprint` of those that it was chosen on


def read_source(path: Path, singer: Singer, lyrics: str = "", genre: str = "") -> Source:
    """A song folder, a song that `l2m generate` wrote, or a file of sound or codes with `lyrics`.

    Lyrics and genre that are given go before those that are found. UserError where there are none, or no sound.
    """
    if path.is_dir():
        try:
            song = read_song(path)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        starts = song.word_times[:, 0] if song.word_times is not None and not lyrics else None
        codes = read_sound(song.audio, singer.codec)
        return Source(codes, lyrics or song.lyrics, genre or song.genre, song.audio, path / "song.lrc", starts)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    request, found = _request(path.with_suffix(".json")), path
    if request is not None:  # generated: its codes are there, exactly
        found = next((p for p in map(path.with_suffix, (".npz", ".ecdc", ".wav")) if p.is_file()), path)
        lyrics, genre = lyrics or request["lyrics"], genre or request["genre"]
    if not lyrics.strip():
        raise UserError(f"{path}: it has no {path.stem}.json of l2m generate to tell its lyrics: --lyrics FILE")
    sound = path.with_suffix(".wav") if request is not None else path
    return Source(read_sound(found, singer.codec), lyrics, genre, sound, path.with_suffix(".lrc"), None)


def _request(path: Path) -> dict[str, str] | None:
    """Lyrics and genre of the song.json that `l2m generate` wrote; None where there is none, or it is no such file."""
    try:
        request = json.loads(path.read_text(encoding="utf-8"))["request"]
        return {name: str(request[name]) for name in ("lyrics", "genre")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def time_words(
    singer: Singer, codes: Int[np.ndarray, "F K"], lyrics: str, genre: str
) -> tuple[Float[np.ndarray, "W 2"], list[str]]:
    """Start and end of each word in seconds, and warnings.

    By the heads in RUN/alignment.json, else by the one that goes along best with this very song. Words after the
    model's window have no times: NaN, with a warning. UserError where the lyrics are beyond the memory.
    """
    prompt, warnings = make_prompt(singer, lyrics, genre)
    parsed, pace, window = parse_lyrics(lyrics), singer.codec.pace, singer.layout.frames
    if not parsed.words:
        return np.zeros((0, 2), np.float32), warnings
    words = memory_words(prompt, split_pieces(singer.encoder, parsed).word)
    song = Teacher(codes[:window], prompt, words, None, len(codes) > window)
    kept = read_reading(singer.run)
    if kept is None:
        reading, _ = choose_heads(singer.model, singer.layout, [song], pace)
        warnings.append(
            f"no heads were chosen for {singer.run}, times may be far off; choose on songs whose times are known: "
            f"l2m align {singer.run} --choose DATA"
        )
    else:
        (reading, step, _), config = kept, singer.info.config.model
        if not reading.heads or any(not (0 <= a < config.layers and 0 <= b < config.heads) for a, b in reading.heads):
            raise UserError(
                f"{singer.run}/alignment.json names heads that the model has not: choose again with --choose"
            )
        if step != singer.step:
            warnings.append(f"heads were chosen at step {step}, this is step {singer.step}: choose again with --choose")
    times = align_song(singer.model, singer.layout, song, reading, pace)
    if song.cut:
        times[times[:, 0] >= window / pace - 1e-3] = np.nan
        times[:, 1] = np.minimum(times[:, 1], window / pace)
        warnings.append(
            f"the song has {len(codes)} frames and the model sees {window}: {np.isnan(times[:, 0]).sum()} words after "
            f"{window / pace:.1f} s have no times"
        )
    return times, warnings


def choose_reading(singer: Singer, dataset: Dataset, most: int) -> tuple[Reading, Errors]:
    """Chooses heads on the first `most` songs, as far as the window goes, and keeps them in RUN/alignment.json.

    UserError where the songs are of another codec or text encoder, or none has words.
    """
    config = singer.info.config.model
    dataset.check(config)
    if apart := singer.info.made_with.differences(dataset.made_with):
        raise UserError(f"{dataset.folder} and {singer.run} were prepared differently ({'; '.join(apart)})")
    pace, chosen = singer.codec.pace, range(min(most, len(dataset)))
    songs = [teacher(dataset[i], config.memory, config.frames, pace) for i in chosen]
    reading, errors = choose_heads(singer.model, singer.layout, songs, pace)
    about = {"l2m_jax": "alignment", "step": singer.step, "heads": reading.heads, "blank": reading.blank}
    about |= {"chosen_on": dataset.folder.resolve().name, "songs": len(songs)}
    about |= {"songs_fingerprint": dataset.fingerprint}
    about |= {"errors": errors._asdict() if errors.words else None}
    write_json(singer.run / "alignment.json", about)
    return reading, errors


def read_reading(run: Path) -> Kept | None:
    """What RUN/alignment.json says; None where there is none. UserError where it is damaged."""
    path = run / "alignment.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        heads: list[Head] = [(int(layer), int(head)) for layer, head in about["heads"]]
        reading = Reading(tuple(heads), float(about["blank"]))
        return Kept(reading, int(about["step"]), str(about.get("songs_fingerprint", "")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); write it anew: l2m align {run} --choose DATA") from None


def to_lrc(lyrics: str, times: Float[np.ndarray, "W 2"]) -> str:
    """The lyrics in enhanced LRC. Section tags are comments; they and empty lines clear the line before at its end.

    It ends with the last word that has a time.
    """
    parsed = parse_lyrics(lyrics)
    words, lines = parsed.words[: np.isfinite(times[:, 0]).sum()], parsed.lines
    text = lyrics.removeprefix("\ufeff").splitlines()
    if len(words) < len(parsed.words):
        text = text[: lines[len(words) - 1] + 1] if words else []
    out, shown = ["[re:l2m_jax]"], False
    word = 0
    for number, line in enumerate([*text, ""]):
        first = word
        while word < len(words) and lines[word] == number:
            word += 1
        if word > first:
            sung = (f"<{_clock(times[i, 0])}> {words[i]}" for i in range(first, word))
            out.append(f"[{_clock(times[first, 0])}] {' '.join(sung)}")
        elif shown:
            out.append(f"[{_clock(times[word - 1, 1])}]")
        if word == first and line.strip():
            out.append(f"# {line.strip()}")
        shown = word > first
    return "\n".join(out) + "\n"


def _clock(seconds: float | np.floating) -> str:
    """mm:ss.xx"""
    hundredths = round(100 * float(seconds))
    return f"{hundredths // 6000:02d}:{hundredths // 100 % 60:02d}.{hundredths % 100:02d}"


def write_lrc(path: Path, lyrics: str, times: Float[np.ndarray, "W 2"]) -> None:
    """Writes song.lrc, whole or not at all."""
    write_atomic(path, to_lrc(lyrics, times).encode("utf-8", "backslashreplace"))


def labels(lyrics: str, times: Float[np.ndarray, "W 2"]) -> Sequence[Label]:
    """The words at their times, for the picture."""
    return [
        Label(word, float(start), float(end))
        for word, (start, end) in zip(parse_lyrics(lyrics).words, times)
        if np.isfinite(start)
    ]


def describe_errors(errors: Errors) -> str:
    """In words."""
    shares = f"{errors.within_100_ms:.0%} within 100 ms, {errors.within_300_ms:.0%} within 300 ms"
    return f"{errors.words} word starts: median error {errors.median_ms:.0f} ms, mean {errors.mean_ms:.0f} ms, {shares}"
