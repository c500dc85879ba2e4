"""What devices tell each other in a compiled program, read from XLA's text. After `compiled`; tests and `plan` use it.

Of an optimised program (`jit(f).lower(...).compile().as_text()`), for CPU, GPU or TPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf'^\s+(?:ROOT )?%?[\w.-]+ = ([^%"]*?) ({"|".join(KINDS)})(-start)?\(')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"\b(body|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")


class Collective(NamedTuple):
    """One array that devices exchange. Arrays that XLA sends together stand one by one."""

    kind: str  # of KINDS
    dtype: str  # as XLA has it: f32, bf16, s32
    shape: tuple[int, ...]  # whole: after a gather, before a scatter
    bytes: int  # of that shape
    groups: tuple[tuple[int, ...], ...]  # who exchange: places in the order of `mesh.devices`; of a permute, pairs
    times: int  # in one call of the program; the body of a loop of unknown length counts once
    source: str  # JAX's name of the operation: jit(step)/transpose(jvp())/while/body/...

    @property
    def sent(self) -> float:
        """Bytes that each device sends each time, in a ring."""
        share = 1 - 1 / len(self.groups[0]) if self.groups else 0
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of these sizes (`mesh.shape`) along which it goes."""
        places = np.array([np.unravel_index(group, tuple(mesh.values())) for group in self.groups])  # [groups, axis, n]
        return tuple(axis for i, axis in enumerate(mesh) if places.size and np.ptp(places[:, i], axis=-1).any())


def collectives(text: str) -> list[Collective]:
    """Every collective of the compiled program, in the order of its text; those of one device alone are left out."""
    (devices,) = map(int, re.findall(r"num_partitions=(\d+)", text.split("\n", 1)[0]) or [1])
    computations = dict(_computations(text))
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    entry = ""
    for name, lines in computations.items():
        entry = name if lines[0].startswith("ENTRY") else entry
        for line in lines[1:]:
            for _, called in _CALLED.findall(line):
                for callee in re.findall(r"[\w.-]+", called):
                    callers.get(callee, []).append((name, _trips(line, computations)))
    times = {entry: 1}

    def runs(name: str) -> int:
        if name not in times:
            times[name] = sum(runs(caller) * trips for caller, trips in callers[name])
        return times[name]

    found, begun = [], set()
    for name, lines in computations.items():
        for line in lines[1:]:
            if (match := _COLLECTIVE.match(line)) and runs(name):
                arrays = [c for c in _arrays(line, match, devices, runs(name)) if c.groups]
                if name.startswith("all-reduce-scatter"):  # TPU's fusion of a sum and each one's part of it
                    arrays = [c._replace(kind="reduce-scatter") for c in arrays]
                channel = re.search(r"channel_id=(\d+)", line)
                whole = (channel and channel[1], *(c._replace(times=0) for c in arrays))
                if channel is None or whole not in begun:  # TPU begins, carries on and ends one in several fusions
                    found += arrays
                begun.add(whole)
    return found


def _trips(line: str, computations: Mapping[str, list[str]]) -> int:
    """How often the loop of this line runs: as XLA says, or as its condition has it (TPU); 1 where it is not known."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [match[1] for at in lines if (match := re.search(r"= s32\[\]\S* constant\((\d+)\)", at))]
    counts = any(re.search(r"ROOT .* compare\(.*direction=LT", at) for at in lines)
    return int(bounds[0]) if counts and len(bounds) == 1 else 1


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of each computation, its header first."""
    name, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = match[2], [line]
        elif line == "}" and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _arrays(line: str, match: re.Match, devices: int, times: int) -> Iterator[Collective]:
    written, kind, started = match.groups()
    arrays = [
        (dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in re.findall(r"(\w+)\[(.*?)\]", written)
    ]
    groups = tuple(tuple(map(int, group)) for group in _groups(line, devices) if len(group) > 1)
    if started and kind == "all-gather":  # operands, then results
        arrays = arrays[len(arrays) // 2 :]
    elif started and kind == "collective-permute":  # operand, result, two tickets
        arrays = arrays[1:2]
    elif kind == "all-to-all" and len(arrays) > 1:  # a piece for each of the group
        arrays = [(arrays[0][0], (len(arrays), *arrays[0][1]))]
    source = re.search(r'op_name="([^"]*)"', line)
    for dtype, shape in arrays:
        if kind == "reduce-scatter" and groups:
            at = int(re.search(r"dimensions=\{(\d+)\}", line)[1])  # pyright: ignore[reportOptionalSubscript]
            shape = (*shape[:at], shape[at] * len(groups[0]), *shape[at + 1 :])
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        size = math.prod(shape) * bits // 8
        yield Collective(kind, dtype, shape, size, groups, times, source[1] if source else "")


def _groups(line: str, devices: int) -> list[list[int]]:
    """Who exchange, in any of the ways in which XLA writes it; empty braces mean everyone."""
    if pairs := re.search(r"source_target_pairs=\{([{}\d, ]*)\}", line):
        return [pair for pair in _lists(pairs[1]) if pair[0] != pair[1]]
    if listed := re.search(r"replica_groups=\{([{}\d, ]*?)\}[,\s]*(?:\w|$)", line):
        return _lists(listed[1]) or [list(range(devices))]
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _count(counted[2]).reshape(_numbers(counted[1])).tolist()
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        order = meshed[2] or f"[{devices}]"
        places = (_count(order) if "[" in order else np.array(_numbers(order))).reshape([*sizes.values()])
        shape, along = [], []  # an axis, or with `:(before)size` a part of one: what stands before it, itself, the rest
        used = dict(re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", meshed[3]))
        for name, size in sizes.items():
            before, part = _numbers(used[name]) if used.get(name) else (1, size)
            along += [len(shape) + 1] if name in used else []
            shape += [before, part, size // before // part]
        places = places.reshape(shape)
        return (
            np.moveaxis(places, along, range(-len(along), 0)).reshape(-1, math.prod(shape[i] for i in along)).tolist()
        )
    raise ValueError(f"no groups of devices in: {line.strip()[:300]}")


def _lists(text: str) -> list[list[int]]:
    return [_numbers(part) for part in re.findall(r"\{([^{}]*)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _count(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 to 7 in rows of two, transposed, one after the other."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip()).groups()  # pyright: ignore[reportOptionalMemberAccess]
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order) if order else None).reshape(-1)
