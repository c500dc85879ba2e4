"""A codec that is written loads again, here and in transformers."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l2m_jax.codec import decode, encode
from l2m_jax.encodec import Encodec, EncodecConfig
from l2m_jax.publish import save_codec
from l2m_jax.seanet import Span, State
from l2m_jax.weights import codec_tensors, load_codec

SOUND = np.random.default_rng(0).normal(size=6000).astype(np.float32) * 0.1


def make(layers: int) -> tuple[Encodec, EncodecConfig]:
    config = EncodecConfig(num_filters=2, hidden_size=8, num_lstm_layers=layers, codebook_size=64)
    return Encodec(config, 2, nnx.Rngs(3)), config


@pytest.mark.parametrize("layers", [0, 2])
def test_what_is_saved_loads(tmp_path, layers):
    module, config = make(layers)
    save_codec(tmp_path, module, config)
    codec = load_codec(str(tmp_path), 2)
    assert codec.config.num_lstm_layers == layers
    state = State.first(module.encoder, 1)
    ours, _ = module.embed(jnp.asarray(SOUND[None, :5760]), jnp.array(5760), state)
    theirs, _ = codec.module.embed(jnp.asarray(SOUND[None, :5760]), jnp.array(5760), state)
    np.testing.assert_allclose(theirs, ours, atol=3e-3 * float(jnp.abs(ours).max()))  # float16
    x = jnp.ones((1, 4, 8))
    first = State.first(module.decoder, 1)
    heard = [m.decoder(x, Span(jnp.array(4), first.started), first.layers)[0] for m in (module, codec.module)]
    np.testing.assert_allclose(heard[1], heard[0], atol=3e-3 * float(jnp.abs(heard[0]).max()))
    assert json.loads((tmp_path / "config.json").read_text())["num_lstm_layers"] == max(layers, 1)


def test_lengths_beyond_float16_are_kept(tmp_path):
    """A decoder for latents of RMS 1 may have kernels of a million."""
    module, config = make(0)
    first: Any = module.decoder.layers[0]
    kernel = first.kernel
    kernel[...] *= 1e6
    assert np.sqrt((np.asarray(kernel[...]) ** 2).sum((0, 1))).max() > 65_504
    save_codec(tmp_path, module, config)
    loaded: Any = load_codec(str(tmp_path), 2).module.decoder.layers[0]
    np.testing.assert_allclose(loaded.kernel[...], kernel[...], atol=1e-3 * float(jnp.abs(kernel[...]).max()))


def test_what_is_kept_is_written_to_the_bit(tmp_path):
    """Of a codec in float32 too: codes would be others."""
    module, config = make(0)
    name = "quantizer.layers.1.codebook.embed"
    fine = np.asarray(module.codebooks[...])[1] + np.float32(1e-5)
    assert not np.array_equal(fine.astype(np.float16), fine)
    save_codec(tmp_path, module, config, {name: fine})
    assert np.array_equal(codec_tensors(tmp_path)[name], fine)


def test_group_norms_are_refused(tmp_path):
    module, config = make(0)
    with pytest.raises(ValueError, match="only weight_norm"):
        save_codec(tmp_path, module, dataclasses.replace(config, norm_type="time_group_norm"))
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize("layers", [0, 2])
def test_transformers_loads_it(tmp_path, layers):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    save_codec(tmp_path, *make(layers))
    codec = load_codec(str(tmp_path), 2)
    model, info = transformers.EncodecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(".embed_avg" in key or int(key.split(".")[2]) >= 2 for key in info["missing_keys"]), info
    codes = encode(codec, SOUND)
    with torch.no_grad():
        heard = model.decode(torch.tensor(codes.T[None, None]), [None])[0][0, 0].numpy()
    error = np.abs(decode(codec, codes) - heard).max() / np.abs(heard).max()
    print(f"\nwaveform {error:.1e} (tolerance 1e-4)")
    assert error < 1e-4
