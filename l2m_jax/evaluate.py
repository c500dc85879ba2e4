"""A run, evaluated on held-out songs: what `l2m evaluate` does. After `likelihood`, `lrc` and `listening`.

Three parts, each a section of the figures: `likelihood`, `alignment` and `generation`. `report` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console

from l2m_jax.align import Reading, align_song, alignment_errors, choose_heads, teacher
from l2m_jax.bootstrap import estimate
from l2m_jax.checkpoint import load_model
from l2m_jax.config import EvaluateConfig, UserError
from l2m_jax.data import Dataset
from l2m_jax.heard import Recogniser
from l2m_jax.likelihood import measure, summarise
from l2m_jax.listening import evaluate_songs, spread
from l2m_jax.lrc import read_reading
from l2m_jax.progress import Bar, say
from l2m_jax.singer import Singer, load
from l2m_jax.song import check_output
from l2m_jax.songs import Song, scan_songs

CHOOSING = 16  # songs at most on which heads are chosen: every head aligns each of them


class HeldOut(NamedTuple):
    """A trained model and songs that it has not heard."""

    singer: Singer
    dataset: Dataset
    warnings: list[str]


def open_held_out(run: Path, data: Path, step: int | None = None, codec: str = "", text_encoder: str = "") -> HeldOut:
    """The run's checkpoint (the newest by default) and the dataset.

    UserError where they do not fit each other. A dataset that the run was trained on is warned of.
    """
    Dataset(data)  # before the run is loaded, which takes longer
    singer, warnings = load(run, step, codec, text_encoder), []
    dataset = _open(data, singer)
    if singer.info.songs == dataset.fingerprint:
        warnings.append(f"{data} holds the songs that {run} was trained on: these figures are not of held-out songs")
    return HeldOut(singer, dataset, warnings)


def evaluate(
    held_out: HeldOut,
    out: Path,
    settings: EvaluateConfig,
    valid: Path | None = None,
    reference: Path | None = None,
    recogniser: Recogniser | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The figures of all parts in `settings.only`; songs are sung into `out`, where those that are there stay.

    UserError where `valid` or `reference` cannot be used, or `out` cannot be written; SystemExit with a signal's status
    where it ends the singing.
    """
    console = console or Console()
    singer, dataset, warnings = held_out
    choosing = None if valid is None else _open(valid, singer)
    if choosing is not None and choosing.fingerprint == dataset.fingerprint:
        raise UserError(f"--valid {valid} holds the songs of --data: choose heads on others, or leave it out")
    compared = None if reference is None else _open_reference(reference, singer)
    check_output(out / "song.wav")
    figures: dict[str, Any] = {
        "l2m_jax": "evaluation",
        "run": str(singer.run),
        "model": singer.fingerprint,
        "step": singer.step,
        "layout": singer.info.config.model.layout,
        "data": str(dataset.folder),
        "songs": len(dataset),
        "songs_fingerprint": dataset.fingerprint,
        "made_with": singer.info.made_with._asdict(),
        "settings": dataclasses.asdict(settings),
        "warnings": warnings,
    }
    for warning in warnings:
        say(console, f"warning: {warning}")
    reading = _kept_reading(singer, dataset) if choosing is None else None
    if "likelihood" in settings.only:
        figures["likelihood"] = _likelihood(singer, dataset, settings.batch, console)
    if "alignment" in settings.only:
        figures["alignment"], reading = _alignment(singer, dataset, choosing, reading, console)
    if "generation" in settings.only:
        figures["generation"] = evaluate_songs(singer, dataset, settings, out, compared, reading, recogniser, console)
    return figures


def _open(folder: Path, singer: Singer) -> Dataset:
    dataset = Dataset(folder)
    if apart := dataset.made_with.differences(singer.info.made_with):
        raise UserError(
            f"{folder} was prepared with other encoders than the songs of {singer.run} ({'; '.join(apart)}): "
            "prepare its songs the same way"
        )
    dataset.check(singer.info.config.model)
    return dataset


def _open_reference(folder: Path, singer: Singer) -> Dataset | list[Song]:
    """A prepared dataset, or the songs of a folder of songs."""
    if (folder / "songs.jsonl").exists():
        return _open(folder, singer)
    songs, bad = scan_songs(folder)
    if not songs:
        raise UserError(f"--reference {folder}: not one song can be used; {bad[0].id}: {bad[0].reason}")
    return songs


def _likelihood(singer: Singer, dataset: Dataset, batch: int, console: Console) -> dict[str, Any]:
    model = load_model(singer.run, singer.step)[0]  # whose layers are stacked; the singer's are apart
    chunk = singer.info.config.train.chunk
    with Bar(console, "bits per code", len(dataset), "songs") as bar:
        everything, pace = range(len(dataset)), singer.codec.pace
        songs = measure(model, singer.layout, dataset, everything, pace, batch, chunk, bar.update)
    return summarise(songs)


def _kept_reading(singer: Singer, dataset: Dataset) -> Reading | None:
    """The heads in RUN/alignment.json, where they were chosen for this step and on other songs than these."""
    kept = read_reading(singer.run)
    if kept is None or kept.step != singer.step or kept.songs in ("", dataset.fingerprint):
        return None
    return kept.reading


def _alignment(
    singer: Singer, dataset: Dataset, valid: Dataset | None, reading: Reading | None, console: Console
) -> tuple[dict[str, Any], Reading | None]:
    """Word starts of the held-out songs by the given heads, or those that are best on other songs.

    Without word times a note.
    """
    pace, config = singer.codec.pace, singer.info.config.model
    songs, choosing, chosen_on = _timed(dataset), dataset, f"{dataset.folder}, a fifth of its songs"
    chosen = songs[:0]
    if reading is not None:
        chosen_on = f"{singer.run / 'alignment.json'}"
    elif valid is None:
        chosen = spread(songs[::5], CHOOSING)
        songs = np.setdiff1d(songs, chosen)
    else:
        choosing, chosen_on, chosen = valid, str(valid.folder), spread(_timed(valid), CHOOSING)
    if not len(songs) or (reading is None and not len(chosen)):
        note = "none: songs with word times (words.csv) are needed" + ("" if reading else f", of {chosen_on} too")
        say(console, f"alignment: {note}")
        return {"note": note}, reading
    with Bar(console, "word starts", len(songs), "songs") as bar:
        chosen_errors = None
        if reading is None:
            bar.update(0, "choosing heads")
            teachers = [teacher(choosing[int(i)], config.memory, config.frames, pace) for i in chosen]
            reading, chosen_errors = choose_heads(singer.model, singer.layout, teachers, pace)
        found, even, truth = [], [], []
        for i in songs:
            record = dataset[int(i)]
            song = teacher(record, config.memory, config.frames, pace)
            assert song.starts is not None  # _timed chose it
            found.append(align_song(singer.model, singer.layout, song, reading, pace)[:, 0])
            even.append(np.linspace(0, float(record.seconds), len(song.starts), endpoint=False))
            truth.append(song.starts)
            bar.update(len(found))
    figures = {
        "songs": len(songs),
        "songs_cut": int(sum(dataset.frames()[songs] > config.frames)),
        "songs_without_times": len(dataset) - len(_timed(dataset)),
        **reading._asdict(),
        "chosen_on": {
            "songs": len(chosen),
            "data": chosen_on,
            "errors": chosen_errors._asdict() if chosen_errors else None,
        },
        "attention": _errors(found, truth),
        "evenly_spread_words": _errors(even, truth),
    }
    return figures, reading


def _timed(dataset: Dataset) -> np.ndarray:
    """Indices of the songs with word times."""
    return np.flatnonzero(dataset.words_timed())


def _errors(found: Sequence[Float[np.ndarray, " _"]], truth: Sequence[Float[np.ndarray, " _"]]) -> dict[str, Any]:
    """Errors of all words of all songs; of the shares, with intervals over songs."""
    errors = alignment_errors(np.concatenate(found), np.concatenate(truth))._asdict()
    words = np.array([np.isfinite(starts).sum() for starts in truth], float)
    for limit in (100, 300):
        within = [float((1000 * np.abs(a - b) <= limit).sum()) for a, b in zip(found, truth)]
        errors[f"within_{limit}_ms"] = estimate(np.array(within), words)
    return errors
