"""What a run would take on chips that are not there: the real programs, compiled ahead of time. After `generate`.

`train_plan` compiles the train step of `step`, `decode_plan` the decode loop of `sample`; what they say of memory and
of collectives is the compiler's, what they say of FLOPs and of the least time is `roofline`'s.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l2m_jax import sample
from l2m_jax.chips import Topology
from l2m_jax.collectives import collectives
from l2m_jax.config import Config, MeshConfig, SampleConfig
from l2m_jax.data import Example
from l2m_jax.model import Prompt, SoundTransformer
from l2m_jax.roofline import Roofline, Traffic, Work, decode_work, roofline, step_work, sum_up
from l2m_jax.rule import variants
from l2m_jax.sharding import make_mesh
from l2m_jax.step import make_program
from l2m_jax.tokens import Layout, make_layout


class Memory(NamedTuple):
    """Bytes of a chip."""

    parameters: int
    optimizer: int  # or the cache, of the decode loop
    inputs: int  # a batch; or what stays the same from step to step, of the decode loop
    temporaries: int  # activations, gradients, what is gathered
    program: int
    peak: int


class Plan(NamedTuple):
    """A program on a slice of chips."""

    program: str  # train or generate
    topology: str
    chips: int
    mesh: dict[str, int]
    songs: int  # a step; of the decode loop those that are sung together
    positions: int
    dtype: str
    remat: str
    parameters: int
    memory: Memory | None  # None where it does not fit
    limit: float | None  # bytes of a chip
    problem: str  # what the compiler said where it does not fit
    traffic: list[Traffic]
    kernels: int  # Pallas kernels in the program
    work: Work
    estimate: float | None  # FLOPs of a chip as the compiler has them: without kernels, and of each loop one round
    roofline: Roofline | None
    compile_seconds: float

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOPs over what the chips could do in the least time: no MFU can be higher."""
        if self.roofline is None:
            return None
        return self.work.model / self.chips / (self.work.executed / self.roofline.compute) / self.roofline.seconds


def for_chips(config: Config, topology: Topology) -> Config:
    """The config as it runs there: `dtype` auto becomes what it is on these chips."""
    if topology.chip is None or config.model.dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def model_shapes(config: Config) -> Any:
    """The model's parameters as shapes."""
    return jax.eval_shape(lambda: SoundTransformer(config.model, rngs=nnx.Rngs(0)))


def train_plan(config: Config, topology: Topology) -> Plan:
    """The train step as `l2m train` runs it. UserError where the mesh does not divide the model or the batch."""
    config = for_chips(config, topology)
    mesh, layout = make_mesh(config.mesh, topology.devices), make_layout(config.model)
    program = make_program(config, mesh)
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.shapes, jax.ShapeDtypeStruct((), np.int32), _batch(config, layout))
    compiled, problem = _compile(lowered)
    held = (
        _bytes(program.shapes.model, program.shardings.model),
        _bytes(program.shapes.optimizer, program.shardings.optimizer),
    )
    work = step_work(program.shapes.model, config, mesh.shape)
    return _plan("train", config, topology, mesh, config.train.batch, compiled, problem, held, work, begun)


def decode_plan(config: Config, topology: Topology, songs: int, rule: SampleConfig) -> Plan:
    """A step of the decode loop of `l2m generate` with the cache of the longest song; each chip sings its own songs.

    The work is that of a step in the middle of the song, which is the mean.
    """
    config = for_chips(config, topology)
    layout, frames = make_layout(config.model), make_layout(config.model).frames
    one = make_mesh(MeshConfig(data=1), topology.devices[:1])
    chip = NamedSharding(one, PartitionSpec())
    model = jax.eval_shape(lambda: SoundTransformer(config.model, rngs=nnx.Rngs(0)).unstacked())
    empty = np.zeros((songs, config.model.memory), np.int32)
    prompt = Prompt(np.zeros((*empty.shape, config.model.text_width), np.float32), empty, empty, empty)
    none = [np.zeros((0, layout.codebooks), np.int32)] * songs
    rest = (layout, prompt, rule, [0] * songs, [frames] * songs, [0] * songs, none)
    context = jax.eval_shape(lambda model: sample._start(model, *rest), model)
    state = jax.eval_shape(lambda context: sample._first(context.given, np.int32(0), songs, layout), context)
    size = sample.cache_size(layout.positions, layout)
    cache = jax.eval_shape(lambda m, c: sample._prefill(m, c, layout, size), model, context)
    window = min(rule.repetition_window * layout.codebooks // layout.streams, layout.positions)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip),
        (model, context, state, cache, jax.ShapeDtypeStruct((), np.int32)),
    )
    begun = time.perf_counter()
    with jax.set_mesh(one):
        # What a step does not use is in memory all the same.
        step = jax.jit(sample.segment, static_argnames=("layout", "window"), donate_argnames="cache", keep_unused=True)
        lowered = step.lower(*arguments, layout, window if context.rule.repetition is not None else 0)
    compiled, problem = _compile(lowered)
    held = _bytes(model), _bytes(cache)
    rows = len(state.heard) * len(variants(rule))
    work = decode_work(model, config.model, rows, size // 2, len(topology.devices))
    return _plan("generate", config, topology, one, songs, compiled, problem, held, work, begun)


def _batch(config: Config, layout: Layout) -> Example:
    """A batch as shapes, as `data.make_example` makes its songs."""
    songs, memory = config.train.batch, config.model.memory
    shape: Any = jax.ShapeDtypeStruct  # in the place of arrays
    ids, rows = shape((songs, layout.positions, layout.streams), np.int32), shape((songs, memory), np.int32)
    states = shape((songs, memory, config.model.text_width), np.float32)
    return Example(ids, ids, states, rows, rows, rows, shape((songs, memory, 2), np.float32))


def _compile(lowered: Any) -> tuple[Any, str]:
    """The compiled program; where a chip's memory is too small None, and what the compiler says of it."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, re.sub(r"\s+", " ", str(error).partition("RESOURCE_EXHAUSTED:")[2].split("\n\n")[0]).strip()


def _bytes(tree: Any, shardings: Any = None) -> int:
    """Bytes of a chip's part of the arrays."""
    leaves = jax.tree.leaves(tree)
    parts = [x.shape for x in leaves]
    if shardings is not None:
        parts = [s.shard_shape(x.shape) for x, s in zip(leaves, jax.tree.leaves(shardings))]
    return sum(math.prod(part) * x.dtype.itemsize for part, x in zip(parts, leaves))


def _plan(
    program: str,
    config: Config,
    topology: Topology,
    mesh: Mesh,
    songs: int,
    compiled: Any,
    problem: str,
    held: tuple[int, int],
    work: Work,
    begun: float,
) -> Plan:
    chip, memory, traffic, text, estimate, bounds = topology.chip, None, [], "", None, None
    if compiled is not None:
        stats, text = compiled.memory_analysis(), compiled.as_text()
        inputs = stats.argument_size_in_bytes - sum(held)
        made = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
        code = stats.generated_code_size_in_bytes
        memory = Memory(*held, inputs, made, code, stats.argument_size_in_bytes + made + code)
        traffic = sum_up(collectives(text), topology, mesh)
        estimate = compiled.cost_analysis().get("flops")
        bounds = chip and roofline(work, chip, sum(t.seconds or 0 for t in traffic))
    return Plan(
        program=program,
        topology=topology.name,
        chips=len(topology.devices),
        mesh=dict(mesh.shape),
        songs=songs,
        positions=make_layout(config.model).positions,
        dtype=config.model.dtype,
        remat=config.train.remat,
        parameters=sum(x.size for x in jax.tree.leaves(model_shapes(config))),
        memory=memory,
        limit=chip and chip.memory,
        problem=problem,
        traffic=traffic,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        work=work,
        estimate=estimate,
        roofline=bounds,
        compile_seconds=time.perf_counter() - begun,
    )


class Schedule(NamedTuple):
    """A whole job, each step as short as the roofline allows."""

    songs: int
    epochs: float
    steps: int
    hours: float
    chip_hours: float


def schedule(plan: Plan, songs: int, epochs: float) -> Schedule | None:
    """Training on so many songs so often, or singing so many to the full length. None where no roofline is known."""
    if plan.roofline is None:
        return None
    if plan.program == "train":
        steps = math.ceil(songs * epochs / plan.songs)
    else:
        epochs, steps = 1, plan.positions * math.ceil(songs / (plan.songs * plan.chips))
    hours = steps * plan.roofline.seconds / 3600
    return Schedule(songs, epochs, steps, hours, hours * plan.chips)


def describe(plan: Plan, job: Schedule | None = None) -> list[str]:
    """The plan in lines for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one chip"
    what = (
        f"train step of {plan.songs} songs" if plan.program == "train" else f"decode step of {plan.songs} songs a chip"
    )
    lines = [
        f"{plan.topology}: {plan.chips} chip(s), {mesh}; {what} of {plan.positions} positions, {plan.dtype}"
        f"{f', remat {plan.remat}' if plan.program == 'train' else ''}; compiled in {plan.compile_seconds:.0f} s",
        f"parameters    {plan.parameters / 1e6:.1f} M",
    ]
    if plan.memory is None:
        return [*lines, f"memory        does not fit: {plan.problem}"]
    names = Memory._fields if plan.program == "train" else ("parameters", "cache", "prompt", *Memory._fields[3:])
    parts = ", ".join(f"{name} {_size(value)}" for name, value in zip(names, plan.memory))
    room = "" if plan.limit is None else f" of {_size(plan.limit)}"
    lines.append(f"memory        a chip: {parts}{room}")
    for t in plan.traffic:
        times = f"{t.times} of {_size(t.bytes)} in all"
        lines.append(f"collectives   {t.kind} along {' x '.join(t.axes)}: {times}, {_size(t.sent)} sent a chip")
    work, twice = plan.work, plan.work.executed * plan.chips / plan.work.model
    lines.append(
        f"FLOPs         {work.model:.3e} a step by formula; a chip runs {work.executed:.3e}, {twice:.2f} of its part; "
        f"the compiler counts {plan.estimate or 0:.3e}: of loops one round, of {plan.kernels} Pallas kernel(s) none"
    )
    if plan.roofline is not None:
        bounds = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in zip(Roofline._fields, plan.roofline))
        share = 100 * (plan.share_of_peak or 0)
        lines.append(f"roofline      {bounds}: bound by {plan.roofline.bound}, {share:.1f} % of peak at most")
    if job is not None:
        what = (
            f"{job.songs:,} songs x {job.epochs:g} epochs" if plan.program == "train" else f"{job.songs:,} songs sung"
        )
        lines.append(
            f"at least      {what}: {job.steps:,} steps, {job.hours:.3g} hours, {job.chip_hours:.3g} chip-hours"
        )
    return lines


def as_json(plan: Plan, job: Schedule | None = None) -> dict[str, Any]:
    """The plan in values for programs."""
    bounds = plan.roofline and plan.roofline._asdict() | {
        "seconds": plan.roofline.seconds,
        "bound": plan.roofline.bound,
    }
    return plan._asdict() | {
        "memory": plan.memory and plan.memory._asdict(),
        "traffic": [t._asdict() for t in plan.traffic],
        "work": plan.work._asdict(),
        "roofline": bounds,
        "share_of_peak": plan.share_of_peak,
        "schedule": job and job._asdict(),
    }


def _size(count: float) -> str:
    """Bytes for people: 1.50 GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count:.0f} B"
