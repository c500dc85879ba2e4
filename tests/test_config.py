"""Configs: what is refused, what is derived, and JSON back and forth."""

import dataclasses
import json
import math

import pytest

from l2m_jax.config import Config, MeshConfig, ModelConfig, SampleConfig, TrainConfig, UserError, from_json, to_json


@pytest.mark.parametrize(
    "kind, values, names",
    [
        (ModelConfig, {"codebooks": 0}, "model.codebooks is 0"),
        (ModelConfig, {"codebooks": 33}, "at most 32"),
        (ModelConfig, {"width": 100, "heads": 3}, "width 100 must be a multiple of model.heads 3"),
        (ModelConfig, {"heads": 4, "key_heads": 3}, "model.key_heads is 3; .* divides model.heads 4"),
        (ModelConfig, {"key_heads": -1}, "model.key_heads is -1"),
        (ModelConfig, {"attention_width": -4}, "model.attention_width is -4; allowed: 0 .model.width. and above"),
        (ModelConfig, {"attention_width": 30, "heads": 4}, "attention_width 30 must be a multiple of model.heads 4"),
        (ModelConfig, {"width": 12, "heads": 4, "rotary": True}, "model.rotary turns pairs: heads of 3"),
        (ModelConfig, {"frames": -1}, "model.frames is -1"),
        (TrainConfig, {"batch": 0}, "train.batch is 0"),
        (TrainConfig, {"batch": 8, "accumulate": 3}, "accumulate 3 must divide train.batch 8"),
        (TrainConfig, {"lr_max": 0.0}, "lr_max 0.0"),
        (TrainConfig, {"lr_max": math.nan}, "lr_max nan"),
        (TrainConfig, {"lr_max": 1e-4, "lr_min": 1e-3}, "train.lr_min 0.001"),
        (TrainConfig, {"dropout": (0.5, 0.5, 0.1)}, "at most 1"),
        (TrainConfig, {"dropout": (-0.1, 0.5, 0.1)}, "at most 1"),
        (TrainConfig, {"dropout": (math.nan, 0.5, 0.1)}, "at most 1"),
        (TrainConfig, {"weight_decay": -1.0}, "train.weight_decay is -1.0"),
        (TrainConfig, {"clip": 0.0}, "train.clip is 0.0"),
        (TrainConfig, {"beta1": 1.0}, "train.beta1 is 1.0"),
        (TrainConfig, {"beta2": -0.5}, "train.beta2 is -0.5"),
        (SampleConfig, {"temperature": -1.0}, "temperature is -1.0"),
        (SampleConfig, {"temperature": math.nan}, "temperature is nan"),
        (SampleConfig, {"top_k": -1}, "top-k is -1"),
        (SampleConfig, {"top_p": 0.0}, "top-p is 0.0"),
        (SampleConfig, {"top_p": 1.1}, "top-p is 1.1"),
        (SampleConfig, {"min_p": -0.1}, "min-p is -0.1"),
        (SampleConfig, {"min_p": 1.5}, "min-p is 1.5"),
        (SampleConfig, {"repetition_penalty": 0.0}, "repetition-penalty is 0.0"),
        (SampleConfig, {"repetition_penalty": math.nan}, "repetition-penalty is nan"),
        (SampleConfig, {"repetition_window": 0}, "repetition-window is 0"),
        (SampleConfig, {"guidance_lyrics": math.inf}, "guidance-lyrics is inf"),
    ],
)
def test_values_that_are_refused(kind, values, names):
    with pytest.raises(UserError, match=names) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_the_edges_of_what_is_allowed():
    TrainConfig(batch=1, steps=1, warmup=0, lr_min=0.0, weight_decay=0.0, dropout=(0.0, 0.0, 1.0), beta1=0.0)
    SampleConfig(temperature=0.0, top_k=0, top_p=1.0, guidance_lyrics=-1.0)
    ModelConfig(codebooks=32, entries=1, frames=1, memory=1, width=1, heads=1, layers=1)


def test_derived_numbers():
    post, deep = ModelConfig(layers=18, width=512, heads=4), ModelConfig(layers=18, norm="deepnorm")
    narrow = ModelConfig(width=30, heads=4, attention_width=16, key_heads=2)
    assert (narrow.query_width, narrow.head_width, narrow.key_width) == (16, 4, 8)
    assert post.query_width == post.key_width == 512 and post.head_width == 128
    assert post.residual_scale == 1 and post.initial_gain == 1
    assert math.isclose(deep.residual_scale**4, 3 * 18) and math.isclose(deep.initial_gain**-4, 12 * 18)


def test_json_back_and_forth():
    config = Config(
        ModelConfig(layout="delay", norm="deepnorm"), TrainConfig(dropout=(0.1, 0.2, 0.3)), MeshConfig(fsdp=-1, data=2)
    )
    assert from_json(Config, json.loads(json.dumps(to_json(config))), "config.json") == config
    assert from_json(TrainConfig, {"lr_max": 1, "lr_min": 0}, "x").lr_max == 1  # JSON writes 1.0 as it likes
    assert from_json(Config, {}, "x") == Config()


@pytest.mark.parametrize(
    "change, names",
    [
        ({"modle": {}}, "unknown key 'modle'"),
        ({"model": {"widht": 3}}, "model: unknown key 'widht'"),
        ({"model": {"width": "512"}}, "width is '512'; needed: int"),
        ({"model": {"width": 512.0}}, "width is 512.0; needed: int"),
        ({"model": {"layout": "spiral"}}, "layout is 'spiral'"),
        ({"model": 3}, "model is 3"),
        ({"model": None}, "model is None"),
        ({"train": {"remat": True}}, "remat is True; needed: .*Literal.*none"),
        ({"train": {"seed": True}}, "seed is True; needed: int"),
        ({"train": {"dropout": 0.1}}, "dropout is 0.1"),
        ({"train": {"dropout": [0.1, 0.2]}}, r"dropout is \[0.1, 0.2\]"),
        ({"train": {"dropout": [0.1, 0.2, "0.3"]}}, "dropout is"),
    ],
)
def test_json_that_does_not_belong(change, names):
    with pytest.raises(UserError, match=f"^config.json.*{names}") as caught:
        from_json(Config, change, "config.json")
    assert "\n" not in str(caught.value)


def test_configs_are_values():
    assert hash(Config()) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.width = 3  # pyright: ignore[reportAttributeAccessIssue]
