"""The codec against transformers, whole songs against chunks, and its loading."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from l2m_jax import codec as codec_module
from l2m_jax.audio import read_audio
from l2m_jax.codec import (
    Codec,
    _decode_chunk,
    _encode_chunk,
    decode,
    decode_chunk,
    decoder_state,
    encode,
    encode_many,
    encode_scaled,
)
from l2m_jax.config import UserError
from l2m_jax.encodec import Encodec, State
from l2m_jax.published import SHIPPED
from l2m_jax.segments import SCALE
from l2m_jax.sounds import make_clip
from l2m_jax.weights import load_codec, resolve

GOLDEN = np.load(Path(__file__).parent / "golden" / "codec.npz")
SOUND = GOLDEN["sound"].astype(np.float32) / 32_768
SMALL_CONFIG = json.loads(str(GOLDEN["config"]))
SMALL_WEIGHTS = {key.removeprefix("weight/"): GOLDEN[key] for key in GOLDEN.files if key.startswith("weight/")}

embed = jax.jit(Encodec.embed)


def save(folder: Path, config: dict = SMALL_CONFIG, weights: dict[str, np.ndarray] = SMALL_WEIGHTS) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request) -> Codec:
    return load_codec(request.param)


def check(what: str, error: float, tolerance: float) -> None:
    print(f"{what}: error {error:.1e}, tolerance {tolerance:.0e}")
    assert error <= tolerance


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def latents(codec: Codec, samples: np.ndarray) -> np.ndarray:
    """Of the whole signal, in one piece of a multiple of 64 frames."""
    padded = np.pad(samples, (0, -len(samples) % (64 * codec.hop)))[None]
    found, _ = embed(codec.module, padded, jnp.array(len(samples)), State.first(codec.module.encoder, 1))
    return np.asarray(found[0, : -(-len(samples) // codec.hop)])


def check_parity(codec: Codec, samples: np.ndarray, expected: dict[str, np.ndarray], chunk: int = 750) -> None:
    check("latents", relative(latents(codec, samples), expected["latents"]), 1e-4)
    codes = encode(codec, samples, chunk)
    assert codes.dtype == np.int32 and codes.shape == expected["codes"].shape
    check("codes that differ", float(np.mean(codes != expected["codes"])), 1e-3)
    check("waveform", relative(decode(codec, expected["codes"], chunk), expected["wave"]), 1e-4)


def golden(name: str, codebooks: int) -> dict[str, np.ndarray]:
    return {
        key: GOLDEN[f"{name}/{key}"][..., : codebooks if key == "codes" else None]
        for key in ("latents", "codes", "wave")
    }


def test_shipped_codec_is_that_of_transformers(shipped):
    assert (shipped.rate, shipped.frame_rate, shipped.hop) == (24_000, 75, 320)
    assert (shipped.codebooks, shipped.entries) == (2, 1024)
    check_parity(shipped, SOUND, golden(shipped.name, 2))


def test_shipped_weights_are_small(shipped):
    assert (resolve(shipped.name)[1] / "model.safetensors").stat().st_size <= 8e6


def test_lstm_and_dilations_are_those_of_transformers(tmp_path):
    codec = load_codec(save(tmp_path))
    assert codec.codebooks == GOLDEN["small/codes"].shape[1]
    check_parity(codec, SOUND[:4_003], golden("small", codec.codebooks), chunk=100)


def test_shipped_codec_keeps_the_tune(shipped):
    codes = encode(shipped, SOUND)
    wave = decode(shipped, codes)[: len(SOUND)]
    power = np.abs(np.fft.rfft(wave[:6_000] * np.hanning(6_000))) ** 2  # of the first note, 220 Hz: 55 bins
    harmonic = np.abs((np.arange(len(power)) + 27) % 55 - 27) <= 4
    print(f"{power[harmonic].sum() / power.sum():.2f} of the power within 16 Hz of the note's harmonics")
    assert power[harmonic].sum() > 0.5 * power.sum() and len(np.unique(codes)) > 20


@pytest.mark.parametrize("index", [0, 4, 8])
def test_shipped_codec_stays_below_full_scale_where_sound_is_dense_and_loud(shipped, index):
    band = make_clip(7, index, 2.0, "band")
    heard = decode(shipped, encode(shipped, band))[: len(band)]
    assert np.abs(heard).max() < 1
    assert -3 < 10 * np.log10(np.mean(heard**2) / np.mean(band**2)) < 3  # dB: nor is it made quiet for that


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 55, 56, 57, 63, 160, 161, 333, 1_000])
def test_chunks_give_the_whole(small, samples):
    """Chunks of 7 frames are the smallest whose first one can be reflected."""
    whole = encode(small, SOUND[:samples], 128)
    assert whole.shape == (-(-samples // small.hop), 4)
    for chunk in (7, 20):
        np.testing.assert_array_equal(encode(small, SOUND[:samples], chunk), whole)
        error = np.abs(decode(small, whole, chunk) - decode(small, whole, 128)).max()
        check(f"{samples} samples in chunks of {chunk} frames", error, 1e-5)


def test_chunks_of_the_shipped_codec_give_the_whole(shipped):
    whole = encode(shipped, SOUND, 76)
    np.testing.assert_array_equal(encode(shipped, SOUND, 20), whole)
    check("waveform in chunks", np.abs(decode(shipped, whole, 20) - decode(shipped, whole, 76)).max(), 1e-5)


def test_any_length_compiles_once(small):
    """One shape of chunk, whatever the song's length; with chunks long enough to be halved, one for each halving."""
    before = _encode_chunk._cache_size(), _decode_chunk._cache_size()
    for samples in (3, 111, 999):
        decode(small, encode(small, SOUND[:samples], 33), 33)
    assert (_encode_chunk._cache_size(), _decode_chunk._cache_size()) == (before[0] + 1, before[1] + 1)
    for frames in range(1, 400, 19):
        decode(small, encode(small, SOUND[: frames * small.hop], 192), 192)
    assert (_encode_chunk._cache_size(), _decode_chunk._cache_size()) == (before[0] + 3, before[1] + 3)


def test_stream_is_the_whole(small):
    codes = encode(small, SOUND[:1_024], 128)
    state, parts = decoder_state(small), []
    for piece in (codes[:7], codes[7:8], codes[8:100], codes[100:]):
        state, samples = decode_chunk(small, state, piece)
        assert len(samples) == len(piece) * small.hop
        parts.append(samples)
    check("stream", np.abs(np.concatenate(parts) - decode(small, codes, 128)).max(), 1e-5)


def test_songs_of_a_batch_do_not_touch_each_other(small):
    pair = jnp.stack([SOUND[:512], SOUND[512:1_024]])
    both, state = embed(small.module, pair, jnp.array(512), State.first(small.module.encoder, 2))
    waves, _ = small.module.synthesize(small.module.quantize(both), jnp.array(64), State.first(small.module.decoder, 2))
    assert state.started
    for i in range(2):
        check("latents", relative(np.asarray(both[i]), latents(small, np.asarray(pair[i]))), 1e-5)
        alone = decode(small, encode(small, np.asarray(pair[i]), 128), 128)
        check("waveform", relative(np.asarray(waves[i]), alone), 1e-5)


def test_many_sounds_are_encoded_as_one_by_one(small):
    """In one batch, of lengths that end in every way: in another chunk, in a frame, before the padding, at once."""
    sounds = [SOUND[start : start + length] for start, length in enumerate((1_000, 313, 161, 160, 9, 3, 1, 0))]
    together = encode_many(small, sounds, 20)
    assert [len(codes) for codes in together] == [125, 40, 21, 20, 2, 1, 1, 0]
    for sound, codes in zip(sounds, together):
        np.testing.assert_array_equal(codes, encode(small, sound, 20))
    assert encode_many(small, []) == []


def test_silence_and_nothing(small):
    assert encode(small, np.zeros(0, np.float32)).shape == (0, 4)
    assert decode(small, np.zeros((0, 4), np.int32)).shape == (0,)
    assert len(np.unique(encode(small, np.zeros(800, np.float32), 100)[20:], axis=0)) == 1


def test_codes_out_of_range_are_errors(small):
    with pytest.raises(UserError, match="codes go from 0 to 32; codec small has 0 to 31"):
        decode(small, np.array([[0, 1, 2, 32]]))
    with pytest.raises(UserError, match="codes have 2 codebooks; codec small was loaded with 4"):
        decode_chunk(small, decoder_state(small), np.array([[0, 1]]))


def torch_parity(codec: Codec, model, samples: np.ndarray, chunk: int = 750) -> None:
    import torch

    bandwidth = model.config.target_bandwidths[0 if codec.codebooks == 2 else -1]
    with torch.no_grad():
        given = torch.from_numpy(samples)[None, None]
        codes = model.encode(given, bandwidth=bandwidth).audio_codes[:, :, : codec.codebooks]
        expected = {"latents": model.encoder(given)[0].T.numpy(), "codes": codes[0, 0].T.numpy()}
        expected["wave"] = model.decode(codes, [None]).audio_values[0, 0].numpy()
    check_parity(codec, samples, expected, chunk)


@pytest.mark.torch
def test_transformers_loads_the_shipped_folder_and_agrees_on_songs(shipped):
    transformers = pytest.importorskip("transformers")
    if not os.environ.get("L2M_SONGS"):
        pytest.skip("set L2M_SONGS to a folder of songs, song_001/audio.mp3")
    model = transformers.EncodecModel.from_pretrained(resolve(shipped.name)[1]).eval()
    paths = sorted(Path(os.environ["L2M_SONGS"]).glob("*/audio.*"))[:2]
    assert paths
    for path in paths:
        samples = read_audio(path, 24_000)[40 * 24_000 : 50 * 24_000 + 123]
        print(path.parent.name)
        torch_parity(shipped, model, samples)


@pytest.mark.torch
@pytest.mark.parametrize("samples", [*range(1, 18), 24, 48, 49, 55, 56, 57, 401])
def test_transformers_agrees_on_the_shortest_sounds(small, samples):
    """Where the signal is shorter than the padding, the published model puts zeros before it reflects."""
    transformers = pytest.importorskip("transformers")
    import torch

    model = transformers.EncodecModel(transformers.EncodecConfig(**SMALL_CONFIG)).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in SMALL_WEIGHTS.items()}, strict=False)
    torch_parity(small, model, SOUND[:samples], chunk=40)


SEGMENTED = np.load(Path(__file__).parent / "golden" / "segmented.npz")
STEREO = SEGMENTED["sound"].astype(np.float32) / 32_768


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Codec:
    """Stereo, 100 frames a second, segments of 100 frames with 12 samples in common, 4 codebooks of 32 entries."""
    weights = {key.removeprefix("weight/"): SEGMENTED[key] for key in SEGMENTED.files if key.startswith("weight/")}
    folder = tmp_path_factory.mktemp("codecs") / "segmented"
    return load_codec(save(folder, json.loads(str(SEGMENTED["config"])), weights))


def test_a_segmented_codec_is_that_of_transformers(segmented):
    song = encode_scaled(segmented, STEREO)
    assert (segmented.channels, segmented.streams, segmented.frame_rate) == (2, False, 100)
    assert len(np.unique(SEGMENTED["codes"])) == 32
    check("scales", relative(song.scales, SEGMENTED["scales"]), 1e-6)
    check("codes that differ", float(np.mean(song.codes != SEGMENTED["codes"])), 1e-3)
    wave = decode(segmented, SEGMENTED["codes"], scales=song.scales)
    check("waveform", relative(wave, SEGMENTED["wave"][: len(wave)]), 1e-4)
    assert len(STEREO) <= len(wave) < len(STEREO) + segmented.hop


def test_segments_in_one_batch_are_those_alone(segmented, monkeypatch):
    song = encode_scaled(segmented, STEREO)
    wave = decode(segmented, song.codes, scales=song.scales)
    monkeypatch.setattr("l2m_jax.codec.SEGMENTS", 1)
    alone = encode_scaled(segmented, STEREO)
    np.testing.assert_array_equal(alone.codes, song.codes)
    check("waveform", np.abs(decode(segmented, song.codes, scales=song.scales) - wave).max(), 1e-6)


@pytest.mark.parametrize("samples", [1, 7, 9, 500, 788, 792, 799, 800, 801, 1_588])
def test_segments_of_any_length(segmented, samples, monkeypatch):
    """What stands behind a short segment is never heard: not by the norms, nor by the layers that see both sides."""
    song = encode_scaled(segmented, STEREO[:samples])
    frames = sum(-(-min(800, samples - start) // 8) for start in range(0, samples, 788))
    assert song.codes.shape == (frames, 4) and len(song.scales) == -(-samples // 788)
    np.testing.assert_array_equal(encode_many(segmented, [STEREO, STEREO[:samples]])[1], song.codes)
    wave = decode(segmented, song.codes, scales=song.scales)
    assert np.isfinite(wave).all() and samples <= len(wave) < samples + 8
    padded = codec_module._padded

    def followed(pieces, length):
        array, lengths = padded(pieces, length)
        for row, n in zip(array, lengths):
            row[n:] = 7
        return array, lengths

    monkeypatch.setattr(codec_module, "_padded", followed)
    np.testing.assert_array_equal(encode_scaled(segmented, STEREO[:samples]).codes, song.codes)
    np.testing.assert_array_equal(decode(segmented, song.codes, scales=song.scales), wave)


def test_stereo_and_scales_where_they_are_not_given(segmented, small):
    mono = STEREO[:, 0]
    np.testing.assert_array_equal(encode(segmented, mono), encode(segmented, np.stack([mono, mono], axis=1)))
    song = encode_scaled(segmented, STEREO)
    unscaled = decode(segmented, song.codes)
    np.testing.assert_array_equal(unscaled, decode(segmented, song.codes, scales=np.full(3, SCALE, np.float32)))
    assert decode(segmented, song.codes[:0]).shape == (0, 2) and encode(segmented, mono[:0]).shape == (0, 4)
    assert encode_scaled(small, SOUND[:80]).scales is None
    for wrong, reason in (
        (lambda: encode(small, STEREO), r"the sound has shape \[1999, 2\]; codec small wants samples of one channel"),
        (lambda: encode(segmented, STEREO[:, [0, 0, 1]]), "wants samples by 2 channels"),
        (lambda: decode(segmented, song.codes, scales=song.scales[:2]), "2 scales; 253 frames .* are 3 segments"),
        (lambda: decoder_state(segmented), "codec segmented decodes overlapping segments"),
    ):
        with pytest.raises(UserError, match=reason):
            wrong()
