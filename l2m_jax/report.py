"""Figures of an evaluation on the terminal, in evaluation.json and evaluation.md, and as plots. After `evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from l2m_jax.audio import write_atomic
from l2m_jax.bootstrap import Estimate
from l2m_jax.config import UserError
from l2m_jax.picture import draw_bars, draw_confusion, draw_lines
from l2m_jax.progress import say
from l2m_jax.song import write_json

SHOWN = {"right": "right lyrics and genre", "shuffled_lyrics": "shuffled lyrics", "no_lyrics": "no lyrics"}
MISSING = "-"


class Table(NamedTuple):
    """A title, a row of headings, rows of cells, and how it was measured."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    protocol: str = ""


def write_report(out: Path, figures: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables, and writes evaluation.json, evaluation.md and the plots into `out`.

    Parts that `figures` lack stay as `out` has them, where they still hold. UserError where they cannot be written.
    """
    console = console or Console()
    kept = _kept(out, figures)
    figures = figures | kept
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    tables, plots = tabulate(figures), _draw(out, figures)
    text = [f"# {figures['run']}, step {figures['step']}", f"{figures['songs']} songs of {figures['data']}."]
    text += [f"**Warning**: {warning}." for warning in figures["warnings"]]
    text += [part for table in tables for part in (f"## {table.title}", _markdown(table), table.protocol) if part]
    text += [f"![{name}]({name})" for name in plots]
    write_atomic(out / "evaluation.md", ("\n\n".join(text) + "\n").encode())
    write_json(out / "evaluation.json", plain(figures))  # last: what says its step stands beside a text of that step
    for table in tables:
        say(console, table.title)
        shown = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, heading in enumerate(table.head):
            shown.add_column(Text(heading), justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        Console(file=console.file, width=max(console.width, 110)).print(shown)  # off a terminal rich takes 80
        if table.protocol:
            say(console, table.protocol)
    for part in kept:
        say(console, f"{part} is of an earlier evaluation of this model on these songs")
    say(console, f"written in {out}: {', '.join(['evaluation.json', 'evaluation.md', *plots])}")


def _kept(out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """The parts in `out` that are not evaluated anew and still hold: of this model and these songs, sung as now."""

    def estimates(values: dict[str, Any]) -> Any:
        return Estimate(**values) if set(values) == set(Estimate._fields) else values

    def origin(figures: dict[str, Any]) -> tuple[Any, Any]:
        of_songs = [figures[name] for name in ("model", "songs_fingerprint", "made_with")]
        return plain(of_songs), plain([figures["settings"][name] for name in ("songs", "seed", "sampling")])

    now = origin(figures)
    try:
        there = json.loads((out / "evaluation.json").read_text(encoding="utf-8"), object_hook=estimates)
        before = origin(there)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or an older one
        return {}
    same = {"likelihood": now[0] == before[0], "alignment": now[0] == before[0], "generation": now == before}
    return {part: there[part] for part in same if part in there and part not in figures and same[part]}


def plain(value: Any) -> Any:
    """The figures as JSON values: estimates with their names, and null for what is not known."""
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def tabulate(figures: dict[str, Any]) -> list[Table]:
    """A table for each part that was done."""
    tables = []
    if likelihood := figures.get("likelihood"):
        tables += _likelihood(likelihood)
    if alignment := figures.get("alignment"):
        tables.append(_alignment(alignment))
    if generation := figures.get("generation"):
        tables.append(_generation(generation, figures["settings"]["sampling"]))
    return tables


def _likelihood(found: dict[str, Any]) -> list[Table]:
    books = len(found["bits_per_code"]["right"]["each_codebook"])
    each = [f"codebook {k}" for k in range(books)]

    def cells(per_code: dict[str, Any]) -> list[str]:
        return [
            _number(per_code["all_codebooks"]),
            *(_number(book, interval=False) for book in per_code["each_codebook"]),
        ]

    bits = [
        [name.replace("_", " "), *cells(per_code), _number(found["bits_of_the_end"][name], interval=False)]
        for name, per_code in found["bits_per_code"].items()
    ]
    gains = [
        [name.replace("_", " "), *cells(per_code), _number(found["gain_per_sung_word"][name])]
        for name, per_code in found["gain_per_code"].items()
    ]
    of = f"of {found['songs']} songs, {found['codes']} codes, {found['sung_words']} sung words with times"
    if found["songs_cut"]:
        of += f"; {found['songs_cut']} songs are cut, {found['frames_outside_of_the_window']} frames lie outside"
    return [
        Table(f"Bits per code {of}", ("given", "bits per code [95 %]", *each, "end"), bits),
        Table("Gains in bits", ("what is gained", "per code [95 %]", *each, "per sung word [95 %]"), gains),
    ]


def _alignment(found: dict[str, Any]) -> Table:
    head = ("word starts", "words", "median ms", "mean ms", "within 100 ms [95 %]", "within 300 ms [95 %]")
    if "note" in found:
        return Table("Word starts by attention", ("",), [[found["note"]]])

    def row(name: str, errors: dict[str, Any]) -> list[str]:
        shares = (_share(errors[f"within_{limit}_ms"]) for limit in (100, 300))
        times = (_number(errors[f"{kind}_ms"], digits=0) for kind in ("median", "mean"))
        return [name, str(errors["words"]), *times, *shares]

    chosen = found["chosen_on"]
    heads = ", ".join(f"layer {layer} head {head}" for layer, head in found["heads"])
    heads += f", blank {found['blank']}"
    rows = [
        row(f"held-out songs ({found['songs']})", found["attention"]),
        *([row(f"the songs of the choice ({chosen['songs']})", chosen["errors"])] if chosen["errors"] else []),
        row("words evenly spread", found["evenly_spread_words"]),
    ]
    cut = (
        f"{found['songs_cut']} songs are longer than the window: words after it do not count."
        if found["songs_cut"]
        else ""
    )
    return Table(f"Word starts by attention: {heads}, chosen on {chosen['data']}", head, rows, cut)


def _generation(found: dict[str, Any], sampling: dict[str, Any]) -> Table:
    rows = []

    def add(name: str, *path: str) -> None:
        cells = []
        for source in ("generated", "ceiling"):
            value: Any = found[source]
            for key in path:
                value = None if value is None else value.get(key)
            cells.append(
                _share(value) if isinstance(value, Estimate) or path[-1] == "within_100_ms" else _number(value)
            )
        if cells != [MISSING, MISSING]:
            rows.append([name, *cells])

    add("notes right", "notes", "note_accuracy")
    add("right number of notes", "notes", "right_number_of_notes")
    add("songs without a mistake", "notes", "songs_without_a_mistake")
    add("ended by themselves", "ended_by_themselves")
    add("genre right", "genre", "right")
    add("Fréchet distance", "frechet", "distance")
    add("windows of it", "frechet", "windows")
    add("word error rate", "words", "word_error_rate")
    add("phoneme error rate", "words", "phoneme_error_rate")
    for name, key in (
        ("attention against note starts", "attention_against_note_starts"),
        ("note starts against word times", "note_starts_against_word_times"),
    ):
        add(f"{name}, median ms", key, "median_ms")
        add(f"{name}, share within 100 ms", key, "within_100_ms")
    reference = f"{found['reference']['data']} ({found['reference']['songs']})"
    failed = f", {found['failed']} more could not be sung" if found["failed"] else ""
    title = f"{found['songs']} songs sung from held-out lyrics{failed}; genre and distance against {reference}"
    protocol = [f"Sampling: {', '.join(f'{name} {value}' for name, value in sampling.items())}."]
    protocol.append(f"Fréchet distance: {found['generated']['frechet']['embedding']}.")
    if words := found["generated"].get("words"):
        protocol.append(f"Words: {', '.join(f'{name} {value}' for name, value in words['protocol'].items())}.")
    if longer := found["longer_than_the_window"]:
        protocol.append(f"{longer} true songs are longer than the window: the ceiling is of their first part.")
    return Table(title, ("", "generated [95 %]", "the codec's ceiling [95 %]"), rows, " ".join(protocol))


def _number(value: Any, interval: bool = True, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, Estimate):
        low, high = value.low, value.high
        if interval and low is not None and high is not None:
            return f"{value.value:.3f} [{low:.3f}, {high:.3f}]"
        return f"{value.value:.3f}"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _share(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    if value is None or value.low is None:
        return MISSING if value is None else f"{value.value:.1%}"
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _draw(out: Path, figures: dict[str, Any]) -> list[str]:
    """The plots; returns their names."""
    plots = []
    if likelihood := figures.get("likelihood"):
        over_time = likelihood["over_time"]
        curves = {label: over_time["bits_per_code"][name] for name, label in SHOWN.items()}
        draw_lines(out / "over_time.png", over_time["starts_s"], curves, "seconds of the song", "bits per code")
        gains = {name.replace("_", " "): found["all_codebooks"] for name, found in likelihood["gain_per_code"].items()}
        known = {name: (e.value, e.low, e.high) for name, e in gains.items() if e is not None}
        draw_bars(out / "gains.png", known, "bits per code")
        plots += ["over_time.png", "gains.png"]
    if generation := figures.get("generation"):
        found = {s: generation[s]["genre"]["confusion"] for s in ("generated", "ceiling") if generation[s]["genre"]}
        if found:
            draw_confusion(out / "genres.png", found)
            plots.append("genres.png")
    return plots
