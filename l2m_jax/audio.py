"""Audio files <-> samples. Right after config in the flow; knows nothing of codecs.

libsndfile reads mp3, flac, ogg and wav without ffmpeg; soxr changes the sampling rate.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from l2m_jax.config import UserError

BLOCK = 1 << 18
"""Samples of each channel that are read at a time."""
SLACK = 0.25
"""Seconds that a file may be shorter than it claims, or an mp3 longer than its index has it."""


def read_audio(path: str | Path, rate: int, channels: int = 1) -> Float[np.ndarray, "T ..."]:
    """Samples, float32 in about [-1, 1], at `rate` Hz: [T], the mean of the file's channels, or [T, 2] for 2 channels.

    For 2 channels a mono file gives twice the same, and of more than two the first two are taken. UserError where the
    file cannot be read, is empty, cut short or corrupt, or holds samples that are no numbers.
    """
    with _open(path) as file, _Mp3(path, file) as mp3:
        file = mp3.file or file
        blocks = []
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1) if channels == 1 else block[:, [0, min(1, file.channels - 1)]])
        except soundfile.SoundFileError as error:
            at = sum(map(len, blocks)) / file.samplerate
            raise UserError(f"{path}: corrupt audio after {at:.1f} s ({error})") from error
        samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        source_rate = file.samplerate
        says, has = max(file.frames, _claimed_by_wav(file)) / source_rate, len(samples) / source_rate
        if says - has > SLACK and mp3.indexed:
            raise UserError(f"{path}: cut short: it says {says:.1f} s and holds {has:.1f} s; fetch or export it again")
        if file.format == "OGG" and not _ogg_ends(path):
            raise UserError(f"{path}: cut short: no end is marked after its {has:.1f} s; fetch or export it again")
        if (more := mp3.more(has)) > SLACK:
            raise UserError(f"{path}: after the {has:.1f} s that it says, about {more:.0f} s follow; export it again")
    if not np.isfinite(samples).all():
        at = np.argwhere(~np.isfinite(samples))[0, 0] / source_rate
        raise UserError(f"{path}: a sample at {at:.3f} s is NaN or infinite; export it again")
    samples = soxr.resample(samples, source_rate, rate)
    if not len(samples):
        raise UserError(f"{path}: holds no sound (0 samples)")
    return samples


def to_mono(samples: Float[np.ndarray, "T ..."]) -> Float[np.ndarray, " T"]:
    """The mean of the channels, of [T] or [T, 2]."""
    return samples if samples.ndim == 1 else samples.mean(axis=1)


def audio_seconds(path: str | Path) -> float:
    """Length in seconds as the file's header has it; UserError where it cannot be opened."""
    with _open(path) as file:
        return file.frames / file.samplerate


def write_wav(path: str | Path, samples: Float[np.ndarray, "T ..."], rate: int) -> None:
    """Writes a 16-bit WAV, mono [T] or stereo [T, 2], whole or not at all; samples outside [-1, 1] are clipped.

    UserError where a sample is no number, or the file cannot be written.
    """
    samples = np.asarray(samples, np.float32)
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: not written: {np.sum(~np.isfinite(samples))} samples are NaN or infinite")
    wav = io.BytesIO()
    soundfile.write(wav, np.clip(samples, -1, 1), rate, "PCM_16", format="WAV")
    write_atomic(path, wav.getvalue())


def wav_header(rate: int, channels: int = 1) -> bytes:
    """Of a 16-bit WAV whose length nobody knows yet: it claims the longest there is, and players read to the end.

    What follows is `pcm16`; wherever the file ends, it is a whole WAV.
    """
    length = 0xFFFFFFFF
    frame = 2 * channels  # bytes
    fmt = struct.pack("<IHHIIHH", 16, 1, channels, rate, frame * rate, frame, 16)  # PCM
    return struct.pack("<4sI8s", b"RIFF", length, b"WAVEfmt ") + fmt + struct.pack("<4sI", b"data", length)


def pcm16(samples: Float[np.ndarray, "T ..."]) -> bytes:
    """Samples as `write_wav` writes them, without a header."""
    raw = io.BytesIO()
    soundfile.write(raw, np.clip(samples, -1, 1), 1, "PCM_16", endian="LITTLE", format="RAW")
    return raw.getvalue()


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside its place first, then moved there. UserError where that fails."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is none, it is not there either
            part.unlink()


def _open(path: str | Path) -> soundfile.SoundFile:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such audio file")
    if not os.path.getsize(path):
        raise UserError(f"{path}: the audio file is empty (0 bytes)")
    try:
        return soundfile.SoundFile(path)
    except soundfile.SoundFileError as error:
        reason = str(error).split(": ", 1)[-1]
        if "does not exist" in reason:  # what libsndfile says of a file that is there and is no sound
            reason = "its bytes are of another kind"
        raise UserError(f"{path}: cannot be read as mp3, flac, ogg or wav ({reason})") from error


class _Mp3(io.BytesIO):
    """Has an mp3 read to its end, where `file` is one.

    Where it has no index, libsndfile takes its size by its first bit rate for its length, and reads no further: half
    of a song, if its quiet beginning took few bits. So it is told of a larger file than there is.
    """

    LARGER = 64  # at most 320 kbit/s, from 8 on
    file: soundfile.SoundFile | None = None
    """The same sound, to be read in the place of `file`; None where that is no mp3."""
    indexed = True
    """Whether the length of `file` is one that is written in it."""

    def __init__(self, path: str | Path, file: soundfile.SoundFile) -> None:
        super().__init__(Path(path).read_bytes() if file.format == "MP3" else b"")
        self._asked = False
        if file.format == "MP3":
            with contextlib.suppress(soundfile.SoundFileError):  # then it is read as libsndfile opens it itself
                self.file = soundfile.SoundFile(self)
                self.indexed = self.file.frames == file.frames

    def more(self, seconds: float) -> float:
        """About how many seconds follow after the `seconds` that were read: another file's, put behind this one."""
        if self.file is None:
            return 0.0
        read, size = super().tell(), len(self.getbuffer())
        sync = self.getvalue()[read : read + 3]
        follows = sync == b"ID3" or (sync[:1] == b"\xff" and sync[1:2] >= b"\xe0")
        return seconds * (size - read) / read if follows else 0.0

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        self._asked = (offset, whence) == (0, 2)
        return super().seek(offset, whence)

    def tell(self) -> int:
        """As of any file, but at the end."""
        return super().tell() * (self.LARGER if self._asked else 1)


def _claimed_by_wav(file: soundfile.SoundFile) -> int:
    """Samples that a WAV's header claims: libsndfile shortens them to what is there, and says so only in its log."""
    if file.format == "RF64":
        said = re.search(r"^ *Frames *: (\d+)$", file.extra_info, re.MULTILINE)
        return int(said[1]) if said else 0
    said = re.search(r"^data\s*: (\d+) \(should be \d+\)", file.extra_info, re.MULTILINE)
    streamed = 0x7FFF0000  # written to a pipe, whose length nobody knew
    if file.format not in ("WAV", "WAVEX") or not said or int(said[1]) >= streamed:
        return 0
    bytes_per_sample = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
    return int(said[1]) // (bytes_per_sample.get(file.subtype, 8) * file.channels)


def _ogg_ends(path: str | Path) -> bool:
    """Whether the last page of an Ogg file is marked as the last (RFC 3533, section 6)."""
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - 2**17, 0))  # a page has 65,307 bytes at most
        end = file.read()
    at = end.rfind(b"OggS")
    return at >= 0 and len(end) > at + 5 and bool(end[at + 5] & 4)
