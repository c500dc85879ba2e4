"""demo: learns to sing solfege from its lyrics within a quarter of an hour on two CPU cores."""

from l2m_jax.config import Config, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(layout="delay", width=256, heads=4, layers=4, frames=383, memory=32),
    train=TrainConfig(batch=8, steps=1500, lr_max=1e-3, lr_min=1e-4, warmup=100, checkpoint_every=250, remat=False),
)
