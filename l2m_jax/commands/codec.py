"""`l2m codec`: how well a codec keeps the sound of files."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from l2m_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Codec:
    """Encode and decode files, and say what is lost: the ceiling of everything that is sung through this codec."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Sound files (wav, flac, ogg, mp3)."""
    codec: str = "solfege"
    """The codec: `solfege` (in the package), a folder, or a hub id such as facebook/encodec_24khz."""
    codebooks: int | None = None
    """K, codebooks a frame; the codec's lowest bit rate by default."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object a file instead of the table."""
    out: Path | None = None
    """Folder for the reconstructions (NAME.wav) and a picture of both spectrograms each (NAME.png). NAME is the file's,
    or FOLDER_NAME where several have the same."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        if not self.files:
            raise UserError("name at least one sound file")
        from l2m_jax.weights import load_codec

        outs = self._outputs()
        codec = load_codec(self.codec, self.codebooks)
        rows = [self._measure(codec, file, out) for file, out in zip(self.files, outs)]
        if not self.as_json:
            _print_table(rows)
        return 1 if any("error" in row for row in rows) else 0

    def _outputs(self) -> Sequence[Path | None]:
        """The reconstruction of each file. UserError where one would overwrite another, or a file that is given."""
        if self.out is None:
            return [None] * len(self.files)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: name a folder")
        stems, given = collections.Counter(file.stem for file in self.files), {file.resolve() for file in self.files}
        folders = ["" if stems[file.stem] == 1 else f"{file.resolve().parent.name}_" for file in self.files]
        outs = [self.out / f"{folder}{file.stem}.wav" for folder, file in zip(folders, self.files)]
        for i, out in enumerate(outs):
            if out in outs[:i]:
                raise UserError(f"{self.files[i]} and {self.files[outs.index(out)]} would both become {out}")
            if out.resolve() in given:
                raise UserError(f"{out} is a given file, and would be overwritten: name another --out")
        return outs

    def _measure(self, codec: Any, file: Path, out: Path | None) -> dict[str, Any]:
        from l2m_jax.audio import read_audio, to_mono, write_wav
        from l2m_jax.picture import draw_spectrograms
        from l2m_jax.quality import measure

        try:
            samples = read_audio(file, codec.rate, codec.channels)
            quality, heard, _ = measure(codec, samples)
        except UserError as error:
            row: dict[str, Any] = {"file": str(file), "error": str(error)}
        else:
            row = {"file": str(file), "codec": codec.name, **quality._asdict()}
            if out is not None:
                write_wav(out, heard, codec.rate)
                named = {file.name: samples, f"through {codec.name}, {quality.bits_per_s / 1000:g} kbit/s": heard}
                pair = {name: to_mono(sound) for name, sound in named.items()}
                draw_spectrograms(out.with_suffix(".png"), pair, codec.rate)
        if self.as_json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return row


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = {
        "seconds": ("s", "{:.1f}"), "si_sdr_db": ("SI-SDR dB", "{:.1f}"), "mel_distance": ("mel", "{:.2f}"),
        "pitch_cents_median": ("cents", "{:.1f}"), "pitch_within_50_cents": ("in 50 c", "{:.1%}"),
        "entries_used": ("entries", "{}"), "entropy_bits": ("bits", "{}"), "level_db": ("level dB", "{:.1f}"),
        "peak": ("peak", "{:.2f}"), "rtf": ("rtf", "{:.3f}"),
    }  # fmt: skip
    table = Table("file", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title, _ in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    names = collections.Counter(Path(row["file"]).name for row in rows)
    for row in rows:
        if "error" in row:
            continue
        shown = {**row, "entropy_bits": " ".join(f"{bits:.1f}" for bits in row["entropy_bits"])}
        shown["entries_used"] = " ".join(map(str, row["entries_used"]))
        cells = ("-" if shown[name] is None else form.format(shown[name]) for name, (_, form) in columns.items())
        file = Path(row["file"])
        table.add_row(file.name if names[file.name] == 1 else f"{file.resolve().parent.name}/{file.name}", *cells)
    if table.row_count:
        Console(width=max(Console().width, 110)).print(table)  # off a terminal rich takes 80
    for row in rows:
        if "error" in row:
            print(f"left out: {row['error']}")
