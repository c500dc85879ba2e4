"""large: about 1.23 B parameters, 120 s in one context, for a TPU slice such as v5e:8x8.

Cost: 228 TFLOP a song forward and backward, a third more with remat (6 x parameters x 18,432 positions, and for causal
attention 12 x layers x width x positions^2 / 2).
Memory: 16 bytes a parameter for parameters, gradients and AdamW's moments, 20 GB, split over `fsdp`; activations of one
song, kept at the edges of the 22 layers and of their attention in bfloat16: 5.0 GB.
Command: l2m train --config large --data OUT --run RUN --train.batch 128
"""

from l2m_jax.config import Config, MeshConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(width=2048, heads=16, key_heads=4, layers=22, frames=9000, memory=1024, norm="deepnorm"),
    train=TrainConfig(batch=128, steps=200_000, lr_max=1e-4, lr_min=1e-5, warmup=4000, checkpoint_every=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
)
