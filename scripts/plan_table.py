"""Writes the table of docs/plan.md: presets on slices of TPUs, each compiled by `l2m plan` in a process of its own.

    python scripts/plan_table.py docs/plan.md        (needs the extra `tpu`; a few minutes a row on two cores)

The table stands between the lines `<!-- table -->` and `<!-- end of the table -->`; what stands around it stays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from l2m_jax.audio import write_atomic

BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"
ROWS = [  # preset, slice, songs a step; parameters are split over all chips
    *(("small", slices, chips) for slices, chips in (("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4))),
    *(("base", slices, chips) for slices, chips in (("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:2x4", 8))),
    *(("large", slices, chips) for slices, chips in (("v5e:8x8", 64), ("v5p:4x4x4", 64), ("v6e:8x8", 64))),
]
HEADS = (
    "preset, slice, songs a step, GiB a chip, of, MiB sent a chip, least s a step, bound by, peak at most, chip-hours"
)


def row(preset: str, topology: str, songs: int) -> list[str]:
    """A line of the table; what does not fit says so."""
    mesh = "data=1,fsdp=-1"
    command = [sys.executable, "-m", "l2m_jax.cli", "plan", "--config", preset, "--topology", topology, "--json"]
    done = subprocess.run([*command, "--batch", str(songs), "--mesh", mesh], stdout=subprocess.PIPE, text=True)
    if done.returncode > 1:
        sys.exit(f"{preset} on {topology}: no plan")
    plan = json.loads(done.stdout)
    if plan["memory"] is None:
        return [preset, topology, str(songs), "does not fit", *[""] * 6]
    bounds, sent = plan["roofline"], sum(t["sent"] for t in plan["traffic"])
    return [
        preset,
        topology,
        str(songs),
        f"{plan['memory']['peak'] / 2**30:.2f}",
        f"{plan['limit'] / 2**30:.0f}",
        f"{sent / 2**20:.0f}",
        f"{bounds['seconds']:.3g}",
        bounds["bound"],
        f"{100 * plan['share_of_peak']:.0f} %",
        f"{plan['schedule']['chip_hours']:,.0f}",
    ]


def main(path: Path) -> None:
    """Compiles every row and writes the table."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{path}: no {BEGIN.strip()} ... {END.strip()}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    heads = HEADS.split(", ")
    lines = [heads, ["---"] * len(heads)]
    for wanted in ROWS:
        lines.append(row(*wanted))
        print(*lines[-1], flush=True)
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomic(path, (before + BEGIN + table + END + after).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
