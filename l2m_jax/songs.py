"""A folder of songs becomes a list of `Song`: what is on disk, checked, before any sound is read.

    songs/song_001/lyrics.txt    UTF-8
                   audio.mp3     one file of any name: mp3, flac, ogg or wav
                   genre.txt     optional, UTF-8
                   words.csv     optional: word_start,word_end,line_end in seconds, a row per word of the lyrics

A song that breaks a rule becomes a `BadSong` with the reason, so that one bad folder does not stop the others.
Corrupt sound shows when it is read. Stands after `lyrics` and before `data`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float

from l2m_jax.config import UserError
from l2m_jax.lyrics import parse_lyrics

AUDIO = (".mp3", ".flac", ".ogg", ".wav")
LONGEST_NAME = 200
"""Bytes of a folder's name; file systems allow 255, and the prepared record's name is a little longer."""
COLUMNS = "word_start,word_end,line_end"


@dataclasses.dataclass(frozen=True, eq=False)
class Song:
    """One song of a dataset folder."""

    id: str
    """Name of its folder."""
    folder: Path
    audio: Path
    lyrics: str
    """Text of lyrics.txt, section tags included."""
    genre: str
    """Text of genre.txt; empty if there is none."""
    word_times: Float[np.ndarray, "W 3"] | None
    """Rows of words.csv in seconds, float32; line_end is nan but for the last word of a line."""


@dataclasses.dataclass(frozen=True)
class BadSong:
    """A folder that cannot be used."""

    id: str
    reason: str
    """One line: which file, what is wrong, what is allowed."""


def song_folders(folder: str | Path) -> list[Path]:
    """The song folders of `folder` in natural order (song_2 before song_10); UserError if there is none at all.

    Hidden folders and files beside the song folders are ignored.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; a folder of songs is needed, song_001/lyrics.txt and song_001/audio.mp3"
        )
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not names:
        raise UserError(
            f"{folder}: no song folders; put each song in its own: song_001/lyrics.txt and song_001/audio.mp3"
        )
    return [folder / name for name in sorted(names, key=_natural)]


def song_id(folder: Path) -> str:
    """The folder's name, with what is not UTF-8 in it spelled out."""
    return folder.name.encode(errors="backslashreplace").decode()


def scan_songs(folder: str | Path) -> tuple[list[Song], list[BadSong]]:
    """Songs and bad songs of `folder`, each in the order of `song_folders`."""
    songs, bad = [], []
    for path in song_folders(folder):
        try:
            songs.append(read_song(path))
        except UserError as error:
            bad.append(BadSong(song_id(path), str(error)))
    return songs, bad


def read_song(folder: str | Path) -> Song:
    """The song in `folder`. Raises UserError with the one rule that it breaks first."""
    folder = Path(folder)
    try:
        if len(folder.name.encode()) > LONGEST_NAME:
            raise UserError(f"the folder's name is longer than {LONGEST_NAME} bytes; rename it")
        paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except UnicodeEncodeError:
        raise UserError("the folder's name is not UTF-8; rename it") from None
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror}") from None
    files = {path.name: path for path in paths}
    if "lyrics.txt" not in files:
        raise UserError("lyrics.txt is missing")
    lyrics = _read_text(files["lyrics.txt"])
    words = parse_lyrics(lyrics, "lyrics.txt").words

    sounds = sorted(path.name for path in paths if path.suffix.lower() in AUDIO)
    if len(sounds) != 1:
        found = ", ".join(sounds) if sounds else "none"
        raise UserError(f"one audio file is needed ({', '.join(AUDIO)}), found: {found}")
    genre = _read_text(files["genre.txt"]).strip() if "genre.txt" in files else ""
    times = _word_times(_read_text(files["words.csv"]), words) if "words.csv" in files else None
    return Song(folder.name, folder, files[sounds[0]], lyrics, genre, times)


def _word_times(text: str, words: tuple[str, ...]) -> Float[np.ndarray, "W 3"]:
    """Rows of words.csv, checked: [W, 3]."""
    header, *lines = text.strip().splitlines() or [""]
    if header.replace(" ", "").lower() != COLUMNS:
        raise UserError(f"words.csv: its first line is {header[:60]!r}; it must be {COLUMNS}")
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            start, end, line_end = (float(cell) for cell in line.split(","))
        except ValueError:
            raise UserError(f"words.csv, line {number}: {line[:60]!r} is not three numbers ({COLUMNS})") from None
        if not 0 <= start <= end < np.inf:
            raise UserError(f"words.csv, line {number}: {line[:60]!r} is not 0 <= word_start <= word_end, in seconds")
        if line_end < 0 or line_end == np.inf:
            raise UserError(f"words.csv, line {number}: line_end is {line_end}; allowed: seconds, or nan within a line")
        if rows and start < rows[-1][0]:
            raise UserError(f"words.csv, line {number}: word_start {start} is before {rows[-1][0]} of the line above")
        rows.append((start, end, line_end))
    if len(rows) != len(words):
        first = " ".join(words[:8])
        raise UserError(
            f"words.csv has {len(rows)} rows, lyrics.txt {len(words)} words ({first!r} ...); a row per word is needed"
        )
    return np.asarray(rows, np.float32).reshape(-1, 3)


def check_times(song: Song, seconds: float) -> None:
    """UserError where a word begins after the song's end: times may be of another file, or in milliseconds."""
    starts = np.zeros(0) if song.word_times is None else song.word_times[:, 0]
    if (late := np.flatnonzero(starts > seconds)).size:
        raise UserError(
            f"words.csv, line {late[0] + 2}: word_start {starts[late[0]]:g} is after the sound's end at "
            f"{seconds:.1f} s; times are in seconds"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _natural(name: str) -> tuple[list[str | int], str]:
    """Key that sorts digits by their value: 2 before 10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
