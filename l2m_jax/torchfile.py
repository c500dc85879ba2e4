"""Tensors out of the files of `torch.save`, without torch and without executing what they pickle. Right after config.

Such a file is a pickle that names its storages, and the storages' bytes: a zip archive since torch 1.6, one stream
before that. The pickle may ask for nothing but tensors, their storages and dictionaries; anything else is an error.
"""

from __future__ import annotations

import collections
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from l2m_jax.config import UserError

_KINDS = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_STREAM = 0x1950A86A20F9469CFC6C  # the number that the older format begins with


class _Storage(NamedTuple):
    key: str
    kind: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, content: bytes) -> np.ndarray:
        """NumPy checks that the tensor stays within its storage."""
        kind = np.dtype(self.storage.kind)
        strides = [kind.itemsize * stride for stride in self.strides]
        return np.ndarray(self.shape, kind, content, kind.itemsize * self.offset, strides)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict that `torch.save` wrote, read-only.

    UserError where the file is damaged, is no such file, holds anything but named tensors, or asks for other code.
    """
    try:
        with open(path, "rb") as file:
            found, contents = _read_zip(file) if zipfile.is_zipfile(file) else _read_stream(file)
        if not isinstance(found, dict) or not all(isinstance(tensor, _Tensor) for tensor in found.values()):
            raise pickle.UnpicklingError("it holds something else than named tensors; give the weights alone")
        return {str(name): tensor.read(contents[tensor.storage.key]) for name, tensor in found.items()}
    # A damaged pickle can make its reader raise nearly anything.
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a checkpoint of torch ({error or type(error).__name__})") from error


def _read_zip(file: BinaryIO) -> tuple[Any, Mapping[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
        if not pickled:
            raise pickle.UnpicklingError("no data.pkl in it")
        folder = pickled.removesuffix(".pkl") + "/"
        with archive.open(pickled) as stream:
            found = _Unpickler(stream).load()
        names = [name for name in archive.namelist() if name.startswith(folder)]
        return found, {name.removeprefix(folder): archive.read(name) for name in names}


def _read_stream(file: BinaryIO) -> tuple[Any, Mapping[str, bytes]]:
    file.seek(0)
    if _Unpickler(file).load() != _STREAM:
        raise pickle.UnpicklingError("it is not of torch.save")
    _, _, unpickler = _Unpickler(file).load(), _Unpickler(file).load(), _Unpickler(file)  # a version, and a machine
    found = unpickler.load()
    contents = {}
    for key in _Unpickler(file).load():
        (length,) = struct.unpack("<q", file.read(8))
        contents[key] = file.read(length * np.dtype(unpickler.storages[key].kind).itemsize)
    return found, contents


class _Unpickler(pickle.Unpickler):
    """Knows four names, and what it makes of them is ours."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _KINDS:
            return _KINDS[name]
        known: dict[str, Callable] = {
            "torch._utils._rebuild_tensor_v2": lambda *described: _Tensor(*described[:4]),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "collections.OrderedDict": collections.OrderedDict,
        }
        if (asked := f"{module}.{name}") not in known:
            raise pickle.UnpicklingError(f"it asks for {asked}, which is not executed; save the tensors alone")
        return known[asked]

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        if kind not in _KINDS.values():  # a file may write any text there
            raise pickle.UnpicklingError(f"it has a storage of kind {kind!r}")
        return self.storages.setdefault(key, _Storage(key, kind))
