"""small: 512 wide, 4 heads, 4 layers, 18,000 codes (120 s) in one context.

Cost: 18.1 M parameters; `scripts/bench_train.py` times a step. Attention is half as wide as the model: a step of 18,000
codes is 1.4 times as quick as with --model.attention-width 512. What that costs was seen on `benchmark` alone, its
attention halved: held-out loss 2.72 and 2.31 after 250 and 500 steps, not 2.66 and 2.24.
Memory: 0.9 GiB of state, gradients and activations at its peak, batch 1, float32, beside Python and JAX themselves.
The four query heads share one key head 64 wide: the cache of 16,000 codes is 33 MB.
Command: l2m train --config small --data OUT --run RUN
On a CPU, --model.layout delay halves the positions of a song, and --model.frames 2250 takes windows of 30 s.
"""

from l2m_jax.config import Config, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(width=512, heads=4, key_heads=1, attention_width=256, layers=4, frames=9000, memory=768),
    train=TrainConfig(batch=1, steps=20_000, lr_max=3e-4, lr_min=3e-5, warmup=500),
)
