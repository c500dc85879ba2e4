"""Preparation on a cluster: what `prepare` does to each song, as an Apache Beam transform inside the TFDS builder.

After `prepare`; needs the extra `beam`. The folder of songs and the output must be on a file system that all workers
see. Records are written as everywhere, so that a pipeline that was stopped, or other machines' `--shard`, goes on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions

from l2m_jax.config import UserError
from l2m_jax.data import VERSION, MadeWith, build, read_record, songs_info
from l2m_jax.encoders import Encoders, together
from l2m_jax.prepare import Outcome, Prepared, open_shop, prepare_songs, report, similar
from l2m_jax.songs import song_folders

TOLD = ".outcomes.jsonl"


class _Songs(beam.DoFn):
    """Batches of (number, folder) to outcomes, each with its number; encoders are loaded once by every worker."""

    def __init__(self, out: Path, encoders: Encoders):
        self._out, self._encoders = out, encoders

    def setup(self) -> None:
        self._shop = open_shop(self._out, self._encoders)[0]

    def process(self, batch: Sequence[tuple[int, Path]]) -> Iterator[tuple[int, Outcome]]:
        numbers, folders = zip(*batch)
        yield from zip(numbers, prepare_songs(folders, self._shop))


class PrepareSongs(beam.PTransform):
    """Folders of songs to their records, as (number, fields of `data.Record`) in the order of the folders.

    What became of each song, those that were left out too, goes to OUT/.outcomes.jsonl.
    """

    def __init__(self, out: Path, encoders: Encoders, batches: Sequence[Sequence[tuple[int, Path]]]):
        super().__init__()
        self._out, self._encoders, self._batches = out, encoders, batches

    def expand(self, pipeline: Any) -> Any:
        """Beam's name for what a transform does."""
        outcomes = (
            pipeline | beam.Create(self._batches) | beam.Reshuffle() | beam.ParDo(_Songs(self._out, self._encoders))
        )
        lines = outcomes | "Tell" >> beam.MapTuple(lambda number, outcome: json.dumps([number, *outcome]))
        _ = lines | beam.io.WriteToText(str(self._out / TOLD), shard_name_template="")
        kept = outcomes | beam.Filter(lambda numbered: not numbered[1].reason)
        return kept | "Read" >> beam.Map(_read, records=self._out / "records")


def _read(numbered: tuple[int, Outcome], records: Path) -> tuple[int, dict[str, Any]]:
    number, outcome = numbered
    return number, read_record(records / f"{outcome.song}.npz")[0]._asdict()


class _Preparing(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Makes the dataset from songs, where `data.pack` makes it from records."""

    name = "songs"
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, transform: PrepareSongs, made_with: MadeWith, **kwargs: Any):
        self._transform, self._made_with = transform, made_with
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return songs_info(self, self._made_with)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> PrepareSongs:
        return self._transform


def prepare_with_beam(
    folder: Path, out: Path, encoders: Encoders, runner: str = "DirectRunner", options: Sequence[str] = ()
) -> Prepared:
    """Like `prepare.prepare`, with the songs spread over the workers of a Beam runner; `options` are without dashes.

    UserError where the pipeline fails; what it had done by then is not done again.
    """
    folder, out = folder.resolve(), out.resolve()
    folders = song_folders(folder)
    shop, _ = open_shop(out, encoders)
    number = {path: i for i, path in enumerate(folders)}
    batches = [[(number[path], path) for path in batch] for batch in similar(folders, together(shop.codec))]
    settings = tfds.download.DownloadConfig(
        beam_runner=runner, beam_options=PipelineOptions([f"--{option}" for option in options])
    )
    told = out / TOLD
    told.unlink(missing_ok=True)
    make = functools.partial(_Preparing, PrepareSongs(out, encoders, batches), shop.made_with)
    failed = None
    try:
        build(out, make, settings)
    except UserError:
        raise
    except Exception as error:  # whatever a runner lets through
        failed = error
    if not told.exists():
        why = "without --beam, l2m prepare says what is wrong with each song"
        raise UserError(f"the Beam pipeline failed: {failed}; {why}")
    lines = sorted(json.loads(line) for line in told.read_text(encoding="utf-8").splitlines())
    done = report(folder, out, [Outcome(*line[1:]) for line in lines])  # says so where not one song was left
    if failed:
        raise UserError(f"the Beam pipeline failed: {failed}")
    told.unlink()
    return done
