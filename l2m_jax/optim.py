"""AdamW with warm-up and cosine. After `sharding`, before `checkpoint`."""

from __future__ import annotations

from typing import Any

import jax
import optax

from l2m_jax.config import TrainConfig
from l2m_jax.sharding import path_name


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to lr_max, then cosine to lr_min at the last step."""
    last = max(config.steps - 1, 1)  # steps count from 0
    warmup = min(config.warmup, last - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr_max / (warmup + 1),  # not 0: the first step should move
        peak_value=config.lr_max,
        warmup_steps=warmup,
        decay_steps=last,
        end_value=config.lr_min,
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weight decay on matrices (kernels) only."""

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=matrices
        ),
    )
