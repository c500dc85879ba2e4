"""Chips that a program can be compiled for without having them: their figures and their slices. After `config`.

`open_topology` must run before JAX looks for its devices. TPU programs are compiled by libtpu (the extra `tpu`), which
needs no TPU; `cpu:8` is eight devices in the place of one CPU, for trying a layout out.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from l2m_jax.config import UserError


class Chip(NamedTuple):
    """Figures of one chip, as its maker publishes them."""

    kind: str  # what JAX calls it
    flops: float  # products and sums a second in bfloat16
    memory: float  # bytes of HBM
    bandwidth: float  # bytes/s to and from HBM
    interconnect: float  # bytes/s to and from other chips, all links, both directions together
    dimensions: int  # of the torus; two links each
    ring: int  # an axis of so many chips (or a multiple) closes to a ring
    largest: int  # chips of a slice

    @property
    def link(self) -> float:
        """Bytes/s of one link in one direction."""
        return self.interconnect / (4 * self.dimensions)


# https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, "key specifications"; rings:
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, "TPU configurations" (v5p: cubes of 4 x 4 x 4).
CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 400e9, 2, 16, 256),
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 1200e9, 3, 4, 8960),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * 2**30, 1638e9, 800e9, 2, 16, 256),
}
# libtpu must neither ask the cloud where it is, nor write of it to the terminal, nor take a lock: it compiles only.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MOST_CPUS = 8960  # as many as a slice may have chips


class Topology(NamedTuple):
    """A slice of chips."""

    name: str
    chip: Chip | None  # no figures are known of cpu
    shape: tuple[int, ...]  # of the torus
    devices: list[Any]

    def closes(self, axis: int) -> bool:
        """Whether the axis of the torus is a ring; of three dimensions it is in whole cubes only."""
        if self.chip is None or self.shape[axis] % self.chip.ring:
            return False
        return self.chip.dimensions == 2 or all(n % self.chip.ring == 0 for n in self.shape)

    @property
    def links(self) -> float:
        """Bytes/s that a chip can send at most, over all of its links; 0 of one chip alone, or of unknown ones."""
        axes = [axis for axis, chips in enumerate(self.shape) if chips > 1]
        return self.chip.link * sum(1 + self.closes(axis) for axis in axes) if self.chip else 0.0


def parse_topology(name: str) -> tuple[Chip | None, tuple[int, ...]]:
    """Chip and shape of `v5e:4x8`, `v5p:2x2x4` or `cpu:8`. UserError where there is no such slice."""
    written = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kinds = ", ".join(CHIPS)
    if not written or (written[1] != "cpu" and written[1] not in CHIPS):
        raise UserError(f"--topology {name}: give a kind of chip and a shape, v5e:4x8 or cpu:8; kinds: {kinds}, cpu")
    kind, shape = written[1], tuple(map(int, written[2].split("x")))
    chip = CHIPS.get(kind)
    largest = MOST_CPUS if chip is None else chip.largest
    if not 1 <= math.prod(shape) <= largest:
        raise UserError(f"--topology {name}: {math.prod(shape)} chips; allowed: 1 to {largest}")
    if chip is None:
        if len(shape) > 1:
            raise UserError(f"--topology {name}: cpu takes a number of devices, as in cpu:8")
    elif len(shape) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise UserError(
            f"--topology {name}: a slice of {kind} has {chip.dimensions} dimensions, as in {kind}:{example}"
        )
    elif math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2):
        raise UserError(
            f"--topology {name}: hosts have 2x2 chips, so that the first two sizes must be even (or all of them 1)"
        )
    return chip, shape


def open_topology(name: str) -> Topology:
    """The slice of this name, with devices that programs can be compiled for. UserError where it cannot be had."""
    chip, shape = parse_topology(name)
    if chip is not None and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {name} needs libtpu, which compiles for TPUs: pip install -e '.[tpu]'")
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    import jax
    from jax.experimental import topologies

    if chip is None:
        return Topology(name, None, shape, _cpus(shape[0]))
    jax.config.update("jax_platforms", "cpu")  # where there are TPUs, they are left alone
    hosts = (1,) * 3 if math.prod(shape) == 1 else (2, 2, 1)
    try:
        slices = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=hosts)
    except Exception as error:  # whatever libtpu says of it
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology {name}: libtpu knows no such slice ({reason})") from error
    return Topology(name, chip, shape, list(slices.devices))


def _cpus(count: int) -> list[Any]:
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started
        pass
    if len(jax.devices("cpu")) < count:
        raise UserError(
            f"--topology cpu:{count}: JAX has started with {len(jax.devices('cpu'))} devices in this process"
        )
    return jax.devices("cpu")[:count]
