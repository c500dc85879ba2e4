"""Does `l2m prepare` run in flat memory, however many songs there are?

    python scripts/bench_prepare.py [FOLDER] [--songs 2000] [--workers 1]

Makes short solfege songs, prepares them in a process of its own and adds up the resident memory of that process and its
workers twice a second. The last line is JSON: memory in MiB when the first 200 and when all songs had their records
(medians of the samples around), the highest while they were packed, and songs per second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import tyro

from l2m_jax.cli import answering
from l2m_jax.solfege import make_solfege

EARLY = 200  # songs, after which everything that is compiled has been


@dataclasses.dataclass(frozen=True)
class Job:
    """Measure the memory of a preparation."""

    folder: tyro.conf.Positional[Path | None] = None
    """Where songs and dataset go; a folder that is deleted afterwards by default."""
    songs: int = 2000
    workers: int = 1


def resident(process: psutil.Process) -> float:
    """MiB of the process and all that it started."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total / 2**20


def measure(job: Job, folder: Path) -> dict[str, float]:
    """Prepares the songs; memory and speed."""
    songs, out = folder / "songs", folder / "prepared"
    print(f"{make_solfege(songs, job.songs, seed=7, notes=(1, 2))} songs made", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "l2m_jax.cli", "prepare", songs, out, "--workers", str(job.workers)]
    samples: list[tuple[float, int, float]] = []  # seconds, records, MiB
    with subprocess.Popen(command, stdout=sys.stderr) as running:
        process = psutil.Process(running.pid)
        while running.poll() is None:
            time.sleep(0.5)
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                records = sum(entry.name.endswith(".npz") for entry in os.scandir(out / "records"))
                samples.append((time.monotonic(), records, resident(process)))
    if running.returncode:
        sys.exit(f"l2m prepare left with {running.returncode}")
    when, records, memory = np.array(samples).T
    early = np.abs(records - EARLY) <= EARLY / 4
    late = (records >= job.songs * 0.95) & (records < job.songs)
    first, last = np.flatnonzero(records > 0)[0], np.flatnonzero(records < job.songs)[-1]
    return {
        "songs": job.songs,
        "workers": job.workers,
        f"rss_mib_at_{EARLY}": round(float(np.median(memory[early])), 1),
        f"rss_mib_at_{job.songs}": round(float(np.median(memory[late])), 1),
        "rss_mib_packing": round(float(memory[records == job.songs].max()), 1),
        "songs_per_s": round(float((records[last] - records[first]) / (when[last] - when[first])), 1),
    }


def main(job: Job) -> None:
    """Prints the figures."""
    with contextlib.ExitStack() as stack:
        folder = job.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(json.dumps(measure(job, folder)))


if __name__ == "__main__":
    with answering("bench_prepare"):
        main(tyro.cli(Job))
