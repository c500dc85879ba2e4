"""`l2m plan`: what a run would take on chips that are not there."""

from __future__ import annotations

import dataclasses

from l2m_jax.config import Config, MeshConfig, ModelConfig, SampleConfig, TrainConfig, UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a run for TPUs that are not there: memory, collectives and the least time on them."""

    topology: str
    """Chips: v5e:8x8, v5p:2x2x4, v6e:4x4 (extra `tpu`), or cpu:8, eight devices in the place of one CPU."""
    config: str = "small"
    """Preset (tiny, demo, benchmark, small, base, large) or path of a Python file that defines `config`."""
    mesh: str = ""
    """Devices along each axis, as in data=4,fsdp=16; one may be -1. By default the preset's."""
    batch: int | None = None
    """Songs a step, over all chips, by default train.batch; with --generate those sung together on each chip, or 1."""
    generate: bool = False
    """The decode loop instead of the train step; each chip sings songs of its own."""
    suggest: bool = False
    """Rank meshes, batches (unless --batch) and remat that fit: by formula; the quickest are then compiled."""
    songs: int = 10_000
    """Songs of the corpus, for hours and chip-hours."""
    epochs: float = 100.0
    """How often each is trained on."""
    json: bool = False
    """A line of JSON for each plan instead of lines for people."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> int:
        """Does it; returns the exit status: 1 where it does not fit."""
        import json

        from l2m_jax.chips import open_topology
        from l2m_jax.cli import load_preset

        if self.generate and (self.mesh or self.suggest):
            raise UserError("--generate runs on each chip alone: it takes neither --mesh nor --suggest")
        if self.suggest and self.mesh:
            raise UserError("--suggest ranks meshes: leave --mesh out")
        for name, value in (("songs", self.songs), ("epochs", self.epochs), ("batch", self.batch)):
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value}; allowed: above 0")
        mesh = parse_mesh(self.mesh) if self.mesh else load_preset(self.config).mesh
        train = self.train
        if self.batch and not self.generate:
            train = dataclasses.replace(train, batch=self.batch)
        config = Config(self.model, train, mesh)
        topology = open_topology(self.topology)

        from l2m_jax.plan import as_json, decode_plan, describe, schedule, train_plan
        from l2m_jax.suggest import suggest

        if self.generate:
            plans = [decode_plan(config, topology, self.batch or 1, SampleConfig())]
        elif self.suggest:
            plans = suggest(config, topology, self.batch)
        else:
            plans = [train_plan(config, topology)]
        for plan in plans:
            job = schedule(plan, self.songs, self.epochs)
            print(json.dumps(as_json(plan, job)) if self.json else "\n".join(describe(plan, job)) + "\n")
        return 0 if plans and all(plan.memory for plan in plans) else 1


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of `data=4,fsdp=16`. UserError where it is written otherwise."""
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (x.strip() for x in part.partition("="))
        if axis not in axes or axis in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh {text}: {part!r} is not AXIS=NUMBER, each axis once; axes: {', '.join(axes)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
