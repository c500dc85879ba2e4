"""Loading: every spelling, every published checkpoint against its originals, every kind of damage."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import music
from test_codec import SMALL_CONFIG, SMALL_WEIGHTS, SOUND, check, relative, save

from l2m_jax.codec import decode, encode, encode_scaled
from l2m_jax.config import UserError
from l2m_jax.encodec import PUBLISHED, Encodec, EncodecConfig
from l2m_jax.published import fingerprint, resolve
from l2m_jax.seanet import Lstm, Span
from l2m_jax.weights import load_codec


def test_spellings_and_storage_load_alike(small, tmp_path):
    newer, older = ("parametrizations.weight.original0", "parametrizations.weight.original1"), ("weight_g", "weight_v")
    old = {key.replace(newer[0], older[0]).replace(newer[1], older[1]): value for key, value in SMALL_WEIGHTS.items()}
    codec = load_codec(save(tmp_path / "old", weights=old), 4)
    assert codec.fingerprint == small.fingerprint and codec.name == "old"
    np.testing.assert_array_equal(encode(codec, SOUND[:800], 128), encode(small, SOUND[:800], 128))

    half = {key: value.astype(np.float16) for key, value in SMALL_WEIGHTS.items()}
    halved = load_codec(save(tmp_path / "half", weights=half))
    widened = load_codec(
        save(tmp_path / "wide", weights={key: value.astype(np.float32) for key, value in half.items()})
    )
    assert halved.fingerprint == widened.fingerprint != small.fingerprint
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(halved.module))


def test_fewer_codebooks_give_the_first_codes(small, tmp_path):
    codec = load_codec(save(tmp_path), 2)
    assert codec.codebooks == 2 and codec.fingerprint == small.fingerprint
    np.testing.assert_array_equal(encode(codec, SOUND[:800], 128), encode(small, SOUND[:800], 128)[:, :2])


def test_zero_lstm_is_none(tmp_path):
    zero = {key: value * (".lstm." not in key) for key, value in SMALL_WEIGHTS.items()}
    codec = load_codec(save(tmp_path, weights=zero), 4)
    assert codec.config.num_lstm_layers == 0
    lstm = jax.tree.map(jnp.zeros_like, Lstm(16, 2, nnx.Rngs(0)))
    x = jnp.array(SOUND[:160]).reshape(1, 10, 16)
    y, _, _ = lstm(x, Span(jnp.array(10), jnp.array(False)), lstm.initial(1))
    np.testing.assert_array_equal(y, x)


def test_fingerprint_is_of_names_shapes_and_values():
    one = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2)}
    assert fingerprint(one) == fingerprint({"b": np.ones(2, np.float16), "a": np.asfortranarray(one["a"])})
    others = [{**one, "b": np.zeros(2)}, {"a": one["a"], "c": one["b"]}, {**one, "a": one["a"].reshape(3, 2)}]
    assert len({fingerprint(x) for x in [one, *others]}) == 4


@pytest.mark.parametrize(("setting", "value"), [
    ("use_causal_conv", False), ("audio_channels", 3), ("norm_type", "time_group_norm"), ("normalize", True),
    ("norm_type", "layer_norm"), ("pad_mode", "constant"), ("trim_right_ratio", 0.5), ("codebook_dim", 4),
    ("model_type", "dac"), ("codebook_size", 1000),
])  # fmt: skip
def test_unsupported_settings_are_named(tmp_path, setting, value):
    with pytest.raises(UserError, match=rf"config\.json: {setting} is {value!r}"):
        load_codec(save(tmp_path, {**SMALL_CONFIG, setting: value}))


def test_damaged_checkpoints_are_errors(tmp_path, monkeypatch):
    some = "encoder.layers.0.conv.bias"
    less = {key: value for key, value in SMALL_WEIGHTS.items() if key != some}
    codebook = {key: value for key, value in SMALL_WEIGHTS.items() if "quantizer.layers.3." not in key}
    gain = "encoder.layers.0.conv.parametrizations.weight.original0"
    no_gain = {key: value for key, value in SMALL_WEIGHTS.items() if key != gain}
    for number, (weights, reason) in enumerate([
        (less, "lacks the parameters encoder.layers.0.bias"),
        ({**SMALL_WEIGHTS, "encoder.layers.9.what": np.ones(1)}, "no place in the model: encoder.layers.9.what"),
        ({**SMALL_WEIGHTS, some: np.ones(3)}, r"encoder.layers.0.bias has shape \(3,\); the config asks for \(4,\)"),
        (codebook, r"codebooks has shape \(3, 32, 8\); the config asks for \(4, 32, 8\)"),
        (no_gain, f"lacks tensor '{gain}'"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            load_codec(save(tmp_path / str(number), weights=weights), 4)

    folder = Path(save(tmp_path / "cut"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1_000])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        load_codec(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        load_codec(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_codec(str(folder))
    with pytest.raises(UserError, match="codebooks is 3; codec solfege has 1 to 2"):
        load_codec(codebooks=3)
    with pytest.raises(UserError, match="solfegge: no such model; possible are solfege .*folder.*[.]th.*hub id"):
        load_codec("solfegge")


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError, match=r"facebook/encodec_24khz: .*cannot be downloaded \(no route to host\); .* folder"
    ):
        load_codec("facebook/encodec_24khz")


def test_a_file_of_metas_is_found_by_itself_or_by_its_folder(tmp_path):
    other = tmp_path / "encodec_24khz-0badcafe.th"
    other.write_bytes(b"nothing")
    for name in (other, tmp_path):
        assert resolve(str(name)) == ("encodec_24khz", other)
        with pytest.raises(UserError, match=r"0badcafe\.th: cannot be read as a checkpoint of torch"):
            load_codec(str(name))
    (tmp_path / "encodec_48khz-1.th").touch()  # which of the two?
    assert resolve(str(tmp_path)) == (tmp_path.name, tmp_path)
    with pytest.raises(UserError, match="none/x.th: no such model"):
        resolve("none/x.th")


@pytest.mark.parametrize(("key", "value"), [
    ("num_filters", "many"), ("num_filters", 0), ("upsampling_ratios", []), ("upsampling_ratios", [8, "5"]),
    ("target_bandwidths", [-1.5]), ("sampling_rate", -1), ("chunk_length_s", "1"), ("kernel_size", {}),
])  # fmt: skip
def test_settings_that_are_no_numbers_are_named(key, value):
    with pytest.raises(UserError, match=f"config.json: {key} is .*numbers above 0 are needed"):
        EncodecConfig.parse({key: value}, "config.json")


@pytest.mark.parametrize("overlap", [None, 0, 0.005, 0.02, 0.5])
def test_other_overlaps_are_refused(overlap):
    settings = {"sampling_rate": 48_000, "chunk_length_s": 1.0, "overlap": overlap}
    with pytest.raises(UserError, match=f"config.json: overlap is {overlap} of 1.0 s"):
        EncodecConfig.parse(settings, "config.json")
    assert EncodecConfig.parse(settings | {"overlap": 0.01}, "config.json").segment_stride == 47_520


def test_published_configuration_has_the_published_size():
    """encodec_24khz: 14.8 million weights, weight_norm folded, beside 32 codebooks at 24 kbit/s."""
    config = EncodecConfig()
    assert [config.codebooks_at(bandwidth) for bandwidth in config.target_bandwidths] == [2, 4, 8, 16, 32]
    shapes = jax.eval_shape(lambda: Encodec(config, 32, nnx.Rngs(0)))
    count = sum(leaf.size for side in (shapes.encoder, shapes.decoder) for leaf in jax.tree.leaves(side))
    assert count == 14_838_625
    assert shapes.codebooks.shape == (32, 1024, 128)


RATES = [("encodec_24khz", rate) for rate in (1.5, 3.0, 6.0, 12.0, 24.0)] + [
    ("encodec_48khz", rate) for rate in (3.0, 6.0, 12.0, 24.0)
]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "bandwidth"), RATES)
def test_published_codecs_agree_with_both_originals(originals, name, bandwidth):
    """Meta's `encodec` and `transformers`; the sound ends in the midst of a frame and of a segment."""
    torch = pytest.importorskip("torch")
    config = PUBLISHED[name]
    meta, transformers, _, folder = originals(name)
    codec = load_codec(str(folder), config.codebooks_at(bandwidth))
    samples = music(int(1.05 * codec.rate) + 77, codec.rate, codec.channels)
    with torch.no_grad():
        given = torch.from_numpy(samples.reshape(1, -1, codec.channels)).mT
        meta.set_target_bandwidth(bandwidth)
        frames = meta.encode(given)
        expected = {"meta": (np.concatenate([codes[0].T.numpy() for codes, _ in frames]), meta.decode(frames))}
        codes, scales, pad = transformers.encode(given, bandwidth=bandwidth, return_dict=False)
        wave = transformers.decode(codes, scales, last_frame_pad_length=pad).audio_values
        joined = codes[:, 0].mT.reshape(-1, codec.codebooks).numpy()
        expected["transformers"] = (joined[: len(joined) - pad], wave)

    song = encode_scaled(codec, samples)
    assert song.codes.dtype == np.int32 and codec.name == name
    for original, (codes, wave) in expected.items():
        check(f"{name} {bandwidth} kbit/s: codes unlike {original}'s", float(np.mean(song.codes != codes)), 1e-3)
        assert len(np.unique(codes)) > 60  # parity of codes that are all the same would prove nothing
        theirs = wave[0].T.numpy().reshape(-1, *samples.shape[1:])[: len(samples)]
        ours = decode(codec, codes.astype(np.int32), scales=song.scales)[: len(samples)]
        check(f"{name} {bandwidth} kbit/s: waveform unlike {original}'s", relative(ours, theirs), 1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["encodec_24khz", "encodec_48khz"])
def test_metas_file_and_the_hubs_folder_are_one_codec(originals, tmp_path, name):
    """In both of torch's formats; by the file or its folder."""
    torch = pytest.importorskip("torch")
    _, _, th, folder = originals(name)
    published = load_codec(str(folder))
    (tmp_path / "older").mkdir()
    torch.save(torch.load(th), tmp_path / "older" / f"{name}-1.th", _use_new_zipfile_serialization=False)
    for place in (th, tmp_path / "older"):
        codec = load_codec(str(place))
        assert (codec.name, codec.config, codec.fingerprint) == (name, PUBLISHED[name], published.fingerprint)
        assert all(map(np.array_equal, jax.tree.leaves(codec.module), jax.tree.leaves(published.module)))


@pytest.mark.torch
def test_the_shortest_last_segment_is_metas_too(originals):
    """100 samples: less than the overlap, so that the segment before lacks a frame."""
    torch = pytest.importorskip("torch")
    meta, _, _, folder = originals("encodec_48khz")
    codec = load_codec(str(folder))
    samples = music(47_520 + 100, 48_000, 2)
    song = encode_scaled(codec, samples)
    with torch.no_grad():
        meta.set_target_bandwidth(3.0)
        frames = meta.encode(torch.from_numpy(samples.T)[None])
        wave = meta.decode(frames)[0].T.numpy()
    assert [codes.shape[2] for codes, _ in frames] == [149, 1]
    codes = np.concatenate([codes[0].T.numpy() for codes, _ in frames]).astype(np.int32)
    check("scales", relative(song.scales, np.array([float(scale) for _, scale in frames])), 1e-6)
    check("codes that differ", float(np.mean(song.codes != codes)), 1e-3)
    ours = decode(codec, codes, scales=song.scales)
    assert len(samples) <= len(ours) == 47_520 + 160
    check("waveform", relative(ours, wave[: len(ours)]), 1e-4)
