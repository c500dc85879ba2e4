"""demo: learns from nothing to sing short solfege songs from their lyrics, on two CPU cores. `make demo` trains it.

5.5 M parameters, 256 wide, 4 layers, `delay`; windows of 2.5 s, 16 songs a step, 1,000 steps. DeepNorm takes twice the
learning rate that the plain post-norm takes, and gets lower in the same number of steps. The songs say when each word
is sung, and a head is taught to look there: `guide`.
"""

from l2m_jax.config import Config, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        layout="delay", width=256, heads=4, layers=4, frames=191, memory=16, norm="deepnorm", rotary=True
    ),
    train=TrainConfig(
        batch=16,
        windows=4,
        steps=1000,
        lr_max=2e-3,
        lr_min=1e-4,
        warmup=100,
        guide=1.0,
        checkpoint_every=250,
        valid_every=100,
        remat="none",
    ),
)
