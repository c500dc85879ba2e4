"""tiny: for tests and for trying the line out. About 0.48 M parameters, 4 s of sound, seconds a run on a CPU."""

from l2m_jax.config import Config, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(layout="delay", frames=300, memory=64, width=64, heads=2, layers=2),
    train=TrainConfig(batch=4, steps=20, warmup=5, lr_max=1e-3, checkpoint_every=10, log_every=1),
)
