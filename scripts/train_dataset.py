"""A folder of songs in, a trained model out, by the same code as `l2m`.

    python scripts/train_dataset.py SONGS RUN [--config small] [--train.steps 1000 ...]

is `l2m prepare SONGS RUN/data` and then `l2m train --data RUN/data --run RUN/run`.
"""

from __future__ import annotations

import sys

from l2m_jax.cli import main as l2m


def main(arguments: list[str]) -> None:
    """Prepares, then trains; songs that cannot be used are named and left out."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    songs, run, *rest = arguments
    try:
        l2m(["prepare", songs, f"{run}/data"])
    except SystemExit as status:
        if status.code not in (0, 1):  # 1: songs were left out
            raise
    l2m(["train", "--data", f"{run}/data", "--run", f"{run}/run", *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
