"""base: about 300 M parameters, 120 s in one context, for one node of GPUs or a TPU slice."""

from l2m_jax.config import Config, MeshConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(width=1024, heads=8, layers=18, frames=9000, memory=1024, norm="deepnorm"),
    train=TrainConfig(batch=64, steps=100_000, lr_max=2e-4, lr_min=2e-5, warmup=2000, checkpoint_every=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
)
