"""small: 512 wide, 4 heads, 4 layers, 18,000 codes (120 s) in one context.

Cost: 20.7 M parameters; `scripts/bench_train.py` times a step.
Memory: 1.1 GiB of state, gradients and activations at its peak, batch 1, float32, beside Python and JAX themselves.
The four query heads share one key head: the cache of 16,000 codes is 65 MB.
Command: l2m train --config small --data OUT --run RUN
On a CPU, --model.layout delay halves the positions of a song, and --model.frames 2250 takes windows of 30 s.
"""

from l2m_jax.config import Config, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(width=512, heads=4, key_heads=1, layers=4, frames=9000, memory=768),
    train=TrainConfig(batch=1, steps=20_000, lr_max=3e-4, lr_min=3e-5, warmup=500),
)
