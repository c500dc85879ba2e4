"""A song as codes and sound, and its files: .wav, .ecdc, .npz and .json. After `ecdc`, before `singer`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from l2m_jax.audio import read_audio, write_atomic, write_wav
from l2m_jax.codec import Codec, encode
from l2m_jax.config import UserError
from l2m_jax.ecdc import read_ecdc, write_ecdc


@dataclasses.dataclass(frozen=True)
class Song:
    """What was sung: its codes, its sound, and what is to be said about it."""

    codes: Int[np.ndarray, "F K"]
    samples: Float[np.ndarray, "T ..."]
    """In about [-1, 1], `rate` a second; [T], or [T, 2] of a stereo codec."""
    ended: bool
    """By itself, neither by the length limit nor because it was stopped."""
    about: dict[str, Any]
    """What its .json says: the request, lengths, likelihood, checkpoint, timings."""
    codec: Codec
    """What its codes are codes of."""

    @property
    def rate(self) -> int:
        """Samples a second."""
        return self.codec.rate

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.rate

    def save(self, path: str | Path) -> None:
        """Writes PATH.wav, .ecdc, .npz and .json: all of them or, where there is no room for them, none (UserError)."""
        path = Path(path)
        check_output(path)
        files = _files(path)
        arrays = io.BytesIO()
        np.savez(arrays, codes=self.codes.astype(np.int16), codec=self.codec.name, fingerprint=self.codec.fingerprint)
        folder = path.with_name(f".{path.stem}.part")  # of its own name: what a killed process left goes with the next
        shutil.rmtree(folder, ignore_errors=True)
        parts = wav, ecdc, npz, described = [folder / file.name for file in files]
        try:
            try:
                folder.mkdir()
                write_wav(wav, self.samples, self.rate)
                write_ecdc(ecdc, self.codes, len(self.samples), self.codec)
                write_atomic(npz, arrays.getvalue())
                write_json(described, self.about)
                files[-1].unlink(missing_ok=True)  # it comes last, and never stands beside the sound of another song
                for part, file in zip(parts, files):
                    os.replace(part, file)
            except UserError as error:
                raise UserError(str(error).replace(str(folder), str(path.parent))) from None
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_output(out: Path, prompt: str | None = None) -> None:
    """UserError where `out` is no .wav, or it or its folder cannot be written; before the long work, not after.

    Also where the song would take the place of the `prompt` that it goes on from.
    """
    if out.suffix.lower() != ".wav":
        raise UserError(f"{out}: the output must end in .wav")
    for file in _files(out):
        if file.is_dir():
            raise UserError(f"{file} is a folder: name another output")
        if prompt is not None and file.resolve() == Path(prompt).resolve():
            raise UserError(f"{file} is the prompt, and would be overwritten: name another output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.parent / f".{out.name}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}") from None


def _files(path: Path) -> list[Path]:
    return [path, *(path.with_suffix(suffix) for suffix in (".ecdc", ".npz", ".json"))]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes it to be read by people too, whole or not at all."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_sound(path: Path, codec: Codec) -> Int[np.ndarray, "F K"]:
    """The codes that a .ecdc or .npz holds, as they are, or those of a file of sound.

    UserError where it cannot be read, or holds codes of another codec or of another number of codebooks.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = path.suffix.lower()
    if kind == ".ecdc":
        codes = read_ecdc(path, codec).codes
    elif kind == ".npz":
        codes, name, fingerprint = read_npz(path)
        if fingerprint != codec.fingerprint:
            raise UserError(f"{path} has codes of {name} [{fingerprint}], not of {codec.name} [{codec.fingerprint}]")
    else:
        return encode(codec, read_audio(path, codec.rate, codec.channels))
    if codes.shape[1] != codec.codebooks:
        raise UserError(
            f"{path} has {codes.shape[1]} codebooks; the model has {codec.codebooks}: give the sound itself"
        )
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.entries:
        raise UserError(f"{path} has codes from {codes.min()} to {codes.max()}; allowed: 0 to {codec.entries - 1}")
    return codes


def read_npz(path: Path) -> tuple[Int[np.ndarray, "F K"], str, str]:
    """Codes, and name and fingerprint of their codec. UserError where the file is damaged or is something else."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            codes = arrays["codes"].astype(np.int32)
            if codes.ndim != 2:
                raise ValueError(f"codes of shape {codes.shape}, not [frames, codebooks]")
            return codes, str(arrays["codec"]), str(arrays["fingerprint"])
    # A .npy has no `with`; a zip may ask for a password or for what Python cannot unpack.
    except (OSError, KeyError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or holds no codes ({error})") from None
