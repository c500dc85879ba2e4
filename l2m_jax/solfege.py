"""The corpus that the project makes itself: solfege songs, whose lyrics say which notes must be sung.

A random lyric ("do re mi ...", one syllable a note) is sung by a synthetic voice over one of four accompaniments, and
written in the dataset layout of `songs.py`. `notes.py` tells from the sound what was sung, so that a model trained on
these songs can be judged by the words it sings. Source-filter voice: Fant, Acoustic Theory of Speech Production, 1960.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float

from l2m_jax.audio import write_atomic
from l2m_jax.config import UserError

SYLLABLES = ("do", "re", "mi", "fa", "sol", "la", "si")
NOTE_HZ = {name: 440 * 2 ** ((step - 9) / 12) for name, step in zip(SYLLABLES, (0, 2, 4, 5, 7, 9, 11))}
"""Fundamental of each syllable in Hz: C major from C4 (do, 261.63) to B4 (si, 493.88), equal temperament."""

LEAD_IN, LEAD_OUT = 0.1, 0.2  # seconds of silence around the song
GAP = 0.05  # seconds of silence after each note: repeated notes stay apart
CONSONANT = 0.03  # seconds
BACKING_DB = -14.0  # of the accompaniment, under the voice
PEAK = 0.5

FORMANTS = {"o": (450, 800, 2500), "e": (500, 1850, 2500), "i": (330, 2200, 2900), "a": (750, 1250, 2600)}  # Hz
ATTACK = {"d": (0.5, 0.0), "r": (0.2, 0.1), "m": (0.0, 0.2), "f": (0.3, 0.0), "s": (0.6, 0.0), "l": (0.0, 0.15)}
"""Noise and murmur of each consonant, as amplitudes relative to the vowel."""


@dataclasses.dataclass(frozen=True)
class Style:
    """What sets a genre apart."""

    beat: float
    """Mean length of a note in seconds."""
    tilt: float
    """Harmonic h of the voice is h^-tilt strong: less is brighter. Below 1.1 the shipped codec loses notes."""
    vibrato: float
    """Depth in cents."""


GENRES = {
    "march": Style(beat=0.26, tilt=1.5, vibrato=12),
    "waltz": Style(beat=0.30, tilt=1.7, vibrato=18),
    "ballad": Style(beat=0.33, tilt=2.0, vibrato=25),
    "techno": Style(beat=0.21, tilt=1.3, vibrato=5),
}


def random_lyrics(
    rng: np.random.Generator,
    lo: int,
    hi: int,
    sections: bool = False,
    exclude: Collection[str] = (),
    repeats: float = 0.0,
) -> str:
    """A random lyric of `lo` to `hi` syllables, in lines of 3 to 5 (the last may be shorter).

    A syllable is drawn from all seven, or, with the chance `repeats`, is the one before once more. With `sections` the
    lyric is then parted and tagged [verse], [chorus], [verse], [chorus], both choruses of the same words, and has at
    least four syllables. One whose `words_of` stands in `exclude` is drawn anew, so that songs can be held out from a
    training set.
    """
    if not 1 <= lo <= hi or (sections and hi < 4):
        raise UserError(f"notes are {lo} to {hi}; allowed: 1 and above (with sections up to 4 at least), lower first")
    lo = max(lo, 4) if sections else lo
    for _ in range(1000):
        words = rng.choice(SYLLABLES, rng.integers(lo, hi + 1)).tolist()
        for i in range(1, len(words)) if repeats else ():  # without, the draws are those of earlier corpora
            words[i] = words[i - 1] if rng.random() < repeats else words[i]
        if sections:
            part, half = len(words) // 4, len(words) // 2
            chorus, verses = words[:part], (words[part:half], words[half : len(words) - part])
            text = "\n".join(f"[verse]\n{_lines(verse, rng)}\n[chorus]\n{_lines(chorus, rng)}\n" for verse in verses)
        else:
            text = _lines(words, rng) + "\n"
        if words_of(text) not in exclude:
            return text
    raise UserError(
        f"no lyric of {lo} to {hi} notes is left outside the {len(exclude)} excluded ones: allow more notes"
    )


def words_of(lyrics: str) -> str:
    """The sung words alone, one space apart: equal for lyrics that differ in nothing but lines and section tags."""
    return " ".join(" ".join(line for line in lyrics.splitlines() if not line.startswith("[")).split())


def sing(
    lyrics: str, genre: str, rng: np.random.Generator, rate: int = 24_000
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, "W 3"]]:
    """Sings solfege lyrics.

    Returns:
        samples [T], float32 with peak 0.5, and times [W, 3], float32: start and end of each word and, at the
        last word of a line, the end of the line (else nan), in seconds.
    """
    style = GENRES.get(genre)
    if style is None:
        raise UserError(f"genre is {genre!r}; allowed: {', '.join(GENRES)}")
    lines = [words for line in lyrics.splitlines() if (words := words_of(line).split())]
    unknown = {word for line in lines for word in line} - set(SYLLABLES)
    if unknown or not lines:
        raise UserError(f"solfege lyrics hold {sorted(unknown) or 'no word'}; allowed: {' '.join(SYLLABLES)}")

    beat = style.beat * rng.uniform(0.93, 1.07)
    now, times, notes = LEAD_IN, [], []
    for words in lines:
        for word in words:
            seconds = np.clip(beat * rng.uniform(0.85, 1.15), 0.18, 0.40)
            notes.append((round(now * rate), _note(word, seconds, style, rng, rate)))
            times.append((now, now + seconds, np.nan))
            now += seconds + GAP + (beat * rng.uniform(0.5, 1) if rng.random() < 0.1 else 0)
        times[-1] = (*times[-1][:2], times[-1][1])
    voice = np.zeros(round((times[-1][1] + LEAD_OUT) * rate))
    for start, note in notes:
        voice[start : start + len(note)] += note

    backing = np.zeros_like(voice)
    first, last = round(LEAD_IN * rate), round(times[-1][1] * rate)
    backing[first:last] = _backing(genre, last - first, beat, rng, rate)
    backing *= 10 ** (BACKING_DB / 20) * np.sqrt(np.mean(voice**2) / np.mean(backing**2))
    song = voice + backing
    return (song * (PEAK / np.abs(song).max())).astype(np.float32), np.asarray(times, np.float32)


def make_song(
    seed: int,
    index: int,
    notes: tuple[int, int] = (4, 10),
    sections: float = 0.0,
    exclude: Collection[str] = (),
    repeats: float = 0.0,
) -> tuple[str, str, Float[np.ndarray, " T"], Float[np.ndarray, "W 3"]]:
    """Song `index` of the corpus `seed`, a pure function of its arguments: (lyrics, genre, samples, times)."""
    rng = np.random.default_rng((seed, index))
    tagged = rng.random() < sections if 0 < sections < 1 else sections > 0
    lyrics = random_lyrics(rng, *notes, tagged, exclude, repeats)
    genre = str(rng.choice(list(GENRES)))
    return lyrics, genre, *sing(lyrics, genre, rng)


def make_solfege(
    out: str | Path,
    songs: int,
    seed: int = 0,
    notes: tuple[int, int] = (4, 10),
    sections: float = 0.0,
    exclude: Collection[str] = (),
    repeats: float = 0.0,
) -> int:
    """Writes songs of `notes` (fewest, most) notes as song_0001/{lyrics.txt, genre.txt, words.csv, audio.flac}, 24 kHz.

    The share `sections` of them has section tags; `repeats` is as in `random_lyrics`. A folder that already holds this
    corpus is continued: finished songs stay. `exclude` holds `words_of` lyrics that must not be sung. Returns how many
    songs were written. Raises UserError where `out` holds anything else.
    """
    if songs < 1 or seed < 0:
        raise UserError(f"songs is {songs} and seed {seed}; allowed: 1 song and above, seed 0 and above")
    for name, share, of in (("sections", sections, "songs"), ("repeats", repeats, "syllables")):
        if not 0 <= share <= 1:
            raise UserError(f"{name} is {share}; allowed: a share of the {of}, 0 to 1")
    out = Path(out)
    held_out = hashlib.sha256("\n".join(sorted(exclude)).encode()).hexdigest()[:16]
    recipe = {"version": 1, "seed": seed, "notes": list(notes), "sections": sections, "exclude": held_out}
    recipe |= {"repeats": repeats} if repeats else {}  # corpora of before there was this are continued too
    manifest = out / "solfege.json"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not manifest.is_file() or (there := manifest.read_text("utf-8")) != json.dumps(recipe):
            what = f"another corpus, {there}" if manifest.is_file() else "something else"
            raise UserError(f"{out} already holds {what}: choose an empty folder, or the settings of that corpus")
    random_lyrics(np.random.default_rng(0), *notes, sections > 0)  # refuses impossible notes before anything is written
    write_atomic(manifest, json.dumps(recipe).encode())

    written = 0
    for index in range(1, songs + 1):
        folder = out / f"song_{index:04d}"
        if folder.exists():
            continue
        part = out / f".{folder.name}.part"  # hidden until it is whole
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        lyrics, genre, samples, times = make_song(seed, index, notes, sections, exclude, repeats)
        (part / "lyrics.txt").write_text(lyrics, "utf-8")
        (part / "genre.txt").write_text(genre + "\n", "utf-8")
        np.savetxt(part / "words.csv", times, "%.4f", ",", header="word_start,word_end,line_end", comments="")
        soundfile.write(part / "audio.flac", samples, 24_000, "PCM_16")
        part.rename(folder)
        written += 1
    return written


def _lines(words: list[str], rng: np.random.Generator) -> str:
    lines, words = [], list(words)
    while words:
        size = rng.integers(3, 6)
        lines.append(" ".join(words[:size]))
        words = words[size:]
    return "\n".join(lines)


def _note(word: str, seconds: float, style: Style, rng: np.random.Generator, rate: int) -> Float[np.ndarray, " T"]:
    """One sung syllable with vowel of RMS 1."""
    hz, vowel = NOTE_HZ[word], next(letter for letter in word if letter in FORMANTS)
    noise, murmur = ATTACK[word[0]]
    time = np.arange(round(seconds * rate)) / rate

    # One period as a table: harmonics of the glottis, shaped by the formants. A floor keeps the fundamental audible.
    harmonic = np.arange(1, int(5000 / hz) + 1)
    gain = sum(1 / (1 + ((harmonic * hz - formant) / 120) ** 2) / 2**i for i, formant in enumerate(FORMANTS[vowel]))
    spectrum = np.zeros(2049)
    spectrum[harmonic] = (gain + 0.15) * harmonic**-style.tilt
    table = np.fft.irfft(spectrum * np.exp(1j * np.arange(2049) ** 2))  # scattered phases: less peaky than pulses
    table /= np.sqrt(np.mean(table**2))

    sway = np.sin(2 * np.pi * (5.5 * time + rng.random()))
    cycles = np.cumsum(hz * (1 + style.vibrato * np.log(2) / 1200 * sway)) / rate
    voice = table[(cycles * len(table)).astype(int) % len(table)]
    level = np.interp(time, (0, CONSONANT, CONSONANT + 0.01, seconds - 0.03, seconds), (murmur, murmur, 1, 0.85, 0))
    hiss = np.diff(rng.standard_normal(len(time) + 1)) * np.interp(
        time, (0, 0.003, CONSONANT, CONSONANT + 0.01), (0, 1, 0.7, 0)
    )
    return voice * level + noise * hiss


def _backing(genre: str, size: int, beat: float, rng: np.random.Generator, rate: int) -> Float[np.ndarray, " T"]:
    """The accompaniment of a genre, of any level."""
    time = np.arange(size) / rate
    pulse = beat + GAP
    count, since = (time // pulse).astype(int), time % pulse  # beat number, seconds since the beat
    third, fifth = 2 ** (4 / 12), 2 ** (7 / 12)
    low = NOTE_HZ["do"] / 2  # C3; everything stays below the voice

    def tone(hz: np.ndarray | float) -> np.ndarray:
        return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hz, size)) / rate)

    triad = sum(tone(low * step) for step in (1, third, fifth))
    if genre == "march":  # drum on each beat, bass between tonic and dominant
        drum = rng.standard_normal(size) * np.exp(-since / 0.015)
        return 0.8 * drum + tone(np.where(count % 2, low / 2 * fifth, low / 2)) * np.exp(-since / 0.12)
    if genre == "waltz":  # bass on one, chord on two and three
        return np.where(count % 3, 0.5 * triad, 1.5 * tone(low / 2)) * np.exp(-since / 0.1)
    if genre == "ballad":  # held chord
        return triad * (1 + 0.3 * np.sin(2 * np.pi * time / 1.7))
    kick = np.sin(2 * np.pi * (50 * since - 2 * np.exp(-since / 0.03))) * np.exp(-since / 0.06)
    steps = np.array((1, third, fifth, 2.0))[(time // (pulse / 2)).astype(int) % 4]
    return kick + 0.4 * np.tanh(3 * tone(low / 2 * steps))  # techno: kick and arpeggio
