"""base: about 260 M parameters, 120 s in one context, for a node of GPUs or a TPU slice.

Cost: 66 TFLOP a song forward and backward, a third more with remat (6 x parameters x 18,432 positions, and for causal
attention 12 x layers x width x positions^2 / 2).
Memory: 16 bytes a parameter for parameters, gradients and AdamW's moments, 4.2 GB, split over `fsdp`; activations of
one song, kept at the edges of the 18 layers and of their attention in bfloat16: 2.0 GB.
Command: l2m train --config base --data OUT --run RUN
"""

from l2m_jax.config import Config, MeshConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(width=1024, heads=8, key_heads=2, layers=18, frames=9000, memory=1024, norm="deepnorm"),
    train=TrainConfig(batch=64, steps=100_000, lr_max=2e-4, lr_min=2e-5, warmup=2000, checkpoint_every=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
)
