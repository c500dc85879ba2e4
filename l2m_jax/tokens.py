"""Codes as the transformer sees them. After `songs`, before `data` and `model`.

Two layouts with one interface, so that model, training and sampling never ask which it is:

    flatten   one code a position:   BOS a0 b0 a1 b1 a2 b2 END        one stream of ids, K V entries
    delay     one frame a position:  BOS a0 a1 a2 END                 K streams of ids, V entries each,
                                     BOS  -  b0 b1 b2                 codebook k shifted right by k (Copet et al., 2023)

Position p of the *targets* is what the model says at step p; the *input* of position p + 1 is the target of position p.
Targets that are not to be learnt (padding, an end that lies outside the window) are PAD, and PAD never counts.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from l2m_jax.config import ModelConfig, UserError

Count = TypeVar("Count", int, Array)
AnyArray = Array | np.ndarray  # on the host or on a device


class Tokens(NamedTuple):
    """One song in the window: what goes in and what should come out."""

    ids: Int[np.ndarray, "T J"]
    targets: Int[np.ndarray, "T J"]


class Place(NamedTuple):
    """Where input positions stand in the song; BOS stands at frame 0 with codebook K."""

    frame: Int[Array, " T"]
    codebook: Int[Array, " T"]


def padded_length(positions: int) -> int:
    """`positions` rounded up to what attention kernels divide: 1,024, or 64 for windows below 1,024."""
    return _round_up(positions, 1024 if positions > 1024 else 64)


@dataclasses.dataclass(frozen=True)
class _Layout(abc.ABC):
    """What both layouts share. `codebooks` K, `entries` V, `frames` F of the window."""

    codebooks: int
    entries: int
    frames: int

    @property
    @abc.abstractmethod
    def streams(self) -> int:
        """J, ids a position."""

    @property
    def codes_per_stream(self) -> int:
        """Ids of a stream that are codes; BOS, END and PAD follow them."""
        return self.entries * self.codebooks // self.streams

    @property
    def bos(self) -> int:
        """Id before the first code, in every stream."""
        return self.codes_per_stream

    @property
    def end(self) -> int:
        """Id of the end of the song, in the first stream."""
        return self.codes_per_stream + 1

    @property
    def pad(self) -> int:
        """Id where there is nothing."""
        return self.codes_per_stream + 2

    @property
    def id_space(self) -> int:
        """W, ids of a stream, padded to a multiple of 128 so that they divide over devices."""
        return _round_up(self.codes_per_stream + 3, 128)

    @property
    def positions(self) -> int:
        """T, positions of the whole window, padded."""
        return padded_length(self.length(self.frames))

    @abc.abstractmethod
    def length(self, frames: Count) -> Count:
        """Target positions of a song of `frames` frames, its end included."""

    @abc.abstractmethod
    def _song(self, codes: np.ndarray, ended: bool) -> np.ndarray:
        """Targets [length, J] of the codes [F, K]."""

    @abc.abstractmethod
    def by_frame(self, values: Shaped[np.ndarray, "T J"], frames: int) -> Shaped[np.ndarray, "frames K"]:
        """What stands at the targets of the first `frames` frames' codes, laid out as the codes are."""

    def encode(self, codes: Int[np.ndarray, "F K"]) -> Tokens:
        """Inputs and targets of a song; of one longer than the window its first frames, and then without an end."""
        if codes.ndim != 2 or codes.shape[1] != self.codebooks:
            raise UserError(f"codes of shape {codes.shape} where [frames, {self.codebooks} codebooks] are needed")
        inside = codes[: self.frames]
        song = self._song(inside.astype(np.int32), ended=len(inside) == len(codes))
        targets = np.full((self.positions, self.streams), self.pad, np.int32)
        targets[: len(song)] = song
        ids = np.roll(targets, 1, axis=0)
        ids[0] = self.bos
        ids[ids == self.end] = self.pad  # END is said, never heard
        return Tokens(ids, targets)


@dataclasses.dataclass(frozen=True)
class Flatten(_Layout):
    """Codes interleaved frame by frame; code c of codebook k is id k V + c."""

    @property
    def streams(self) -> int:
        """J = 1."""
        return 1

    def length(self, frames: Count) -> Count:
        """F K codes and END."""
        return frames * self.codebooks + 1

    def _song(self, codes: np.ndarray, ended: bool) -> np.ndarray:
        ids = (codes + self.entries * np.arange(self.codebooks)).reshape(-1, 1)
        return np.vstack([ids, np.full((1, 1), self.end if ended else self.pad)])

    def by_frame(self, values: Shaped[np.ndarray, "T J"], frames: int) -> Shaped[np.ndarray, "frames K"]:
        """See `_Layout.by_frame`."""
        return values[: frames * self.codebooks].reshape(frames, self.codebooks)

    def decode(self, targets: Int[np.ndarray, "T J"], frames: int) -> Int[np.ndarray, "F K"]:
        """The codes of the first `frames` frames."""
        return self.by_frame(targets, frames) - self.entries * np.arange(self.codebooks)

    def place(self, position: Int[Array, " T"]) -> Place:
        """Frame and codebook of the code that is the input at `position`."""
        before = jnp.maximum(position - 1, 0)
        codebook = jnp.where(position == 0, self.codebooks, before % self.codebooks)
        return Place(before // self.codebooks, codebook)

    def target_frames(self, position: Int[Array, ""]) -> Int[Array, " J"]:
        """The frame of each stream's target at `position`, which is also where END falls if stream 0 says it."""
        return position[None] // self.codebooks

    def allowed(
        self, position: Int[Array, ""], end: Int[Array, " B"], least: Int[Array, " B"], most: Int[Array, " B"]
    ) -> Bool[Array, "B J W"]:
        """Ids that may be said at target `position` (codebook order, END, PAD).

        `end` is the frame at which each song ended (past the window: not yet); END may come from frame `least` on and
        must come at frame `most`.
        """
        ids = jnp.arange(self.id_space)
        frame, codebook = position // self.codebooks, position % self.codebooks
        over = (frame >= end)[:, None]
        code = (ids // self.entries == codebook) & (ids < self.bos) & ~over & (frame < most)[:, None]
        stop = (ids == self.end) & (codebook == 0) & ~over & (frame >= least)[:, None]
        return (code | stop | (over & (ids == self.pad)))[:, None]


@dataclasses.dataclass(frozen=True)
class Delay(_Layout):
    """One position a frame; codebook k stands k positions later. END in stream 0, then K - 1 draining positions."""

    @property
    def streams(self) -> int:
        """J = K."""
        return self.codebooks

    def length(self, frames: Count) -> Count:
        """F frames, END in stream 0 while the others drain."""
        return frames + max(self.codebooks - 1, 1)

    def _song(self, codes: np.ndarray, ended: bool) -> np.ndarray:
        frames = len(codes)
        ids = np.full((self.length(frames), self.codebooks), self.pad)
        for k in range(self.codebooks):
            ids[k : k + frames, k] = codes[:, k]
        if ended:
            ids[frames, 0] = self.end
        return ids

    def by_frame(self, values: Shaped[np.ndarray, "T J"], frames: int) -> Shaped[np.ndarray, "frames K"]:
        """See `_Layout.by_frame`."""
        return np.stack([values[k : k + frames, k] for k in range(self.codebooks)], axis=1)

    def decode(self, targets: Int[np.ndarray, "T J"], frames: int) -> Int[np.ndarray, "F K"]:
        """The codes of the first `frames` frames."""
        return self.by_frame(targets, frames)

    def place(self, position: Int[Array, " T"]) -> Place:
        """Frame of codebook 0 at the input `position`; every stream has its own table, so the codebook is always 0."""
        return Place(jnp.maximum(position - 1, 0), jnp.where(position == 0, self.codebooks, 0))

    def target_frames(self, position: Int[Array, ""]) -> Int[Array, " J"]:
        """The frame of each stream's target at `position`, below 0 where it has none; see `Flatten.target_frames`."""
        return position - jnp.arange(self.codebooks)

    def allowed(
        self, position: Int[Array, ""], end: Int[Array, " B"], least: Int[Array, " B"], most: Int[Array, " B"]
    ) -> Bool[Array, "B J W"]:
        """Ids that may be said at target `position`; see `Flatten.allowed`."""
        ids = jnp.arange(self.id_space)
        frame = self.target_frames(position)[None, :, None]  # of each head
        end, least, most = (x[:, None, None] for x in (end, least, most))
        code = (ids < self.bos) & (frame >= 0) & (frame < jnp.minimum(end, most))
        head0 = (jnp.arange(self.codebooks) == 0)[:, None]
        stop = (ids == self.end) & head0 & (frame < end) & (frame >= least)
        silent = ~(code | stop).any(-1, keepdims=True)
        return code | stop | (silent & (ids == self.pad))


Layout = Flatten | Delay


def make_layout(config: ModelConfig) -> Layout:
    """The layout that the config names."""
    kind = {"flatten": Flatten, "delay": Delay}[config.layout]
    return kind(config.codebooks, config.entries, config.frames)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def windows(layout: Layout, count: int) -> list[Layout]:
    """The layout with windows of 1/count, 2/count, ... of its frames; the last is the whole one."""
    return [dataclasses.replace(layout, frames=-(-layout.frames * part // count)) for part in range(1, count + 1)]
