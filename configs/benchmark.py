"""benchmark: follows solfege songs of 8 to 16 notes with choruses. `scripts/solfege_benchmark.sh` trains and judges it.

5.6 M parameters, 256 wide, 4 layers, `delay`; windows of 7.7 s, 8 songs a step, 10,000 steps, three hours on two cores.
The songs say when each word is sung, and a head is taught to look there: `guide`. With `rotary` it learns that sooner.
With `--model.layout flatten` the same window is twice as many positions.
"""

from l2m_jax.config import Config, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        layout="delay", width=256, heads=4, layers=4, frames=575, memory=24, norm="deepnorm", rotary=True
    ),
    train=TrainConfig(
        batch=8,
        windows=4,
        steps=10_000,
        lr_max=2e-3,
        lr_min=5e-5,
        warmup=100,
        guide=3.0,
        checkpoint_every=250,
        valid_every=250,
        remat="none",
    ),
)
