"""large: about 1.5 B parameters, 120 s in one context, for a TPU slice such as v5e:8x8."""

from l2m_jax.config import Config, MeshConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(width=2048, heads=16, layers=22, frames=9000, memory=1024, norm="deepnorm"),
    train=TrainConfig(batch=128, steps=200_000, lr_max=1e-4, lr_min=1e-5, warmup=4000, checkpoint_every=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
)
