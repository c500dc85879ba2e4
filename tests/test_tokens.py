"""Both layouts: what goes in, what should come out, and what may be said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax.config import ModelConfig, UserError
from l2m_jax.tokens import Delay, Flatten, Layout, make_layout, padded_length

V, F = 16, 12
LAYOUTS = [kind(k, V, F) for kind in (Flatten, Delay) for k in (1, 2, 4)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{type(x).__name__}{x.codebooks}")


def codes_of(frames: int, codebooks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (frames, codebooks))


@each_layout
@pytest.mark.parametrize("frames", [0, 1, 7, F, F + 1, 3 * F])
def test_encode_then_decode_is_the_identity(layout: Layout, frames):
    codes = codes_of(frames, layout.codebooks)
    ids, targets = layout.encode(codes)
    inside = min(frames, F)
    np.testing.assert_array_equal(layout.decode(targets, inside), codes[:inside])
    assert ids.shape == targets.shape == (layout.positions, layout.streams) and ids.dtype == np.int32
    # END stands once, in stream 0 after the last code, and only where the song ends inside of the window.
    ends = np.argwhere(targets == layout.end)
    at = inside * layout.codebooks if isinstance(layout, Flatten) else inside
    np.testing.assert_array_equal(ends, [[at, 0]] if frames <= F else np.empty((0, 2)))
    assert (targets[layout.length(inside) :] == layout.pad).all()
    assert (targets != layout.pad).sum() == inside * layout.codebooks + (frames <= F)


@each_layout
def test_inputs_are_the_targets_before_them(layout: Layout):
    ids, targets = layout.encode(codes_of(7, layout.codebooks))
    assert (ids[0] == layout.bos).all() and not (ids == layout.end).any()
    np.testing.assert_array_equal(ids[1:], np.where(targets == layout.end, layout.pad, targets)[:-1])


def test_the_drawings_of_the_module():
    codes = np.array([[1, 2], [3, 4], [5, 6]])
    flat, delay = Flatten(2, V, F), Delay(2, V, F)
    assert flat.encode(codes).targets[:8, 0].tolist() == [1, V + 2, 3, V + 4, 5, V + 6, flat.end, flat.pad]
    end, pad = delay.end, delay.pad
    assert delay.encode(codes).targets[:5].tolist() == [[1, pad], [3, 2], [5, 4], [end, 6], [pad, pad]]
    assert delay.encode(codes).ids[:5].tolist() == [[delay.bos] * 2, [1, pad], [3, 2], [5, 4], [pad, 6]]


@each_layout
def test_delay_then_undelay(layout: Layout):
    """Codebook k of frame f is said at the position and in the stream that the papers give it."""
    targets = layout.encode(codes := codes_of(7, layout.codebooks)).targets
    for f in range(7):
        for k in range(layout.codebooks):
            if isinstance(layout, Flatten):
                said = targets[f * layout.codebooks + k, 0] - k * V
            else:
                said = targets[f + k, k]
            assert said == codes[f, k]


@each_layout
def test_places(layout: Layout):
    frame, codebook = (np.asarray(x) for x in layout.place(jnp.arange(20)))
    assert (frame[0], codebook[0]) == (0, layout.codebooks)
    for p in range(1, 20):
        flat = isinstance(layout, Flatten)
        assert (frame[p], codebook[p]) == (divmod(p - 1, layout.codebooks) if flat else (p - 1, 0))


def test_sizes_of_the_full_window():
    flat, delay = make_layout(ModelConfig()), make_layout(ModelConfig(layout="delay"))
    assert flat.length(9000) == 18_001 and flat.positions == 18_432
    assert flat.pad == 2_050 and flat.id_space == 2_176  # 2,048 codes and three specials
    assert delay.length(9000) == 9_001 and delay.positions == 9_216
    assert delay.pad == 1_026 and delay.id_space == 1_152
    assert [padded_length(n) for n in (1, 64, 65, 1024, 1025, 18_001)] == [64, 64, 128, 1024, 2048, 18_432]


@each_layout
def test_specials_follow_the_codes(layout: Layout):
    codes = V * layout.codebooks if isinstance(layout, Flatten) else V
    assert (layout.bos, layout.end, layout.pad) == (codes, codes + 1, codes + 2)
    assert layout.id_space % 128 == 0 and layout.id_space > layout.pad


def test_codes_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"\(5, 3\).*2 codebooks"):
        Flatten(2, V, F).encode(codes_of(5, 3))


def walk(layout: Layout, least: np.ndarray, most: np.ndarray, seed: int, end_share: float) -> tuple[np.ndarray, ...]:
    """The sampling loop with ids drawn at random from the allowed ones: what was said [B, T, J] and the ends [B]."""
    rng, songs = np.random.default_rng(seed), len(least)
    allowed = jax.jit(type(layout).allowed, static_argnums=0)
    said = np.full((songs, layout.positions, layout.streams), layout.pad)
    end = np.full(songs, layout.frames + 1)
    for position in range(layout.length(int(most.max()))):
        mask = np.asarray(allowed(layout, jnp.array(position), jnp.array(end), jnp.array(least), jnp.array(most)))
        assert mask.any(-1).all() and not mask[..., layout.bos].any() and not mask[..., layout.pad + 1 :].any()
        for b, j in np.ndindex(songs, layout.streams):
            ids = np.flatnonzero(mask[b, j])
            take_end = layout.end in ids and rng.random() < end_share
            said[b, position, j] = layout.end if take_end else rng.choice(ids)
        ended = said[:, position, 0] == layout.end
        end = np.where(ended, np.minimum(end, int(layout.target_frames(jnp.array(position))[0])), end)
    return said, end


@each_layout
def test_what_may_be_said_is_a_song(layout: Layout):
    """Whatever is drawn, the song is what `encode` makes of its own codes, and as long as it may be."""
    least = np.array([0, 0, 3, 5, 8, F, 0, 2])
    most = np.array([F, 6, F, 5, F, F, 1, F])
    lengths = set()
    for seed, end_share in enumerate((0.0, 0.2, 1.0)):
        said, end = walk(layout, least, most, seed, end_share)
        assert (end >= least).all() and (end <= most).all()
        if end_share == 1:
            np.testing.assert_array_equal(end, least)  # END not before `least`, and then it may come
        for song, n in zip(said, end):
            np.testing.assert_array_equal(song, layout.encode(layout.decode(song, int(n))).targets)
        lengths |= set(end.tolist())
    assert len(lengths) > 5


@each_layout
def test_only_the_end_may_be_said_at_the_limit(layout: Layout):
    """At frame `most` the first stream says END and nothing else; in between, every code of its codebook may come."""
    at = layout.codebooks * 5 if isinstance(layout, Flatten) else 5
    none, limit = jnp.array([F + 1]), jnp.array([5])
    before, last = (np.asarray(layout.allowed(jnp.array(p), none, limit * 0, limit))[0, 0] for p in (0, at))
    assert np.flatnonzero(last).tolist() == [layout.end]
    assert np.flatnonzero(before).tolist() == [*range(V), layout.end]
    early = np.asarray(layout.allowed(jnp.array(0), none, limit, limit))[0, 0]
    assert np.flatnonzero(early).tolist() == [*range(V)]


def test_draining():
    """After END at frame 3 codebook k still says its frames up to 2, then PAD."""
    layout, end = Delay(4, V, F), jnp.array([3])
    for position in range(3, 9):
        mask = np.asarray(layout.allowed(jnp.array(position), end, end * 0, end * 0 + F))[0]
        for k in range(4):
            if position == 3 and k == 0:
                continue  # END itself
            ids = [*range(V)] if 0 <= position - k < 3 else [layout.pad]
            assert np.flatnonzero(mask[k]).tolist() == ids
