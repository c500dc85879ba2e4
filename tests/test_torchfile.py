"""torch's files without torch: what they hold, what they may not ask for, what damage does.

The pickles are written out by hand here, as torch's protocol 2 has them; the live files are in test_weights.
"""

import collections
import io
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from l2m_jax.config import UserError
from l2m_jax.torchfile import read_torch


class Global:
    """Pickled as a name that the reader looks up."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Storage:
    def __init__(self, kind: str, key: str, values: np.ndarray):
        self.kind, self.key, self.values = kind, key, values


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        self.described = storage, offset, shape, strides, False, collections.OrderedDict()


class Pickler(pickle._Pickler):
    """In Python, so that names of modules that are not here can be written."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global("torch", obj.kind), obj.key, "cpu", len(obj.values))
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            return self.write(f"c{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, Tensor):
            self.save(Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(obj.described)
            return self.write(pickle.REDUCE)
        return super().save(obj, save_persistent_id)


def pickled(value) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


FLOATS = Storage("FloatStorage", "0", np.arange(12, dtype=np.float32))
HALVES = Storage("HalfStorage", "1", np.array([0.5, -2], np.float16))
STATE = collections.OrderedDict(
    a=Tensor(FLOATS, 0, (3, 4), (4, 1)), b=Tensor(FLOATS, 4, (4, 2), (1, 4)), c=Tensor(HALVES, 0, (2,), (1,))
)


def write_zip(path: Path, content: bytes, storages=(FLOATS, HALVES)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.values.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_stream(path: Path, content: bytes) -> Path:
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    parts += [content, pickle.dumps(["1", "0"], 2)]
    parts += [struct.pack("<q", len(storage.values)) + storage.values.tobytes() for storage in (HALVES, FLOATS)]
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_tensors_are_views_of_their_storages(tmp_path, write):
    found = read_torch(write(tmp_path / "a.th", pickled(STATE)))
    assert list(found) == ["a", "b", "c"]
    np.testing.assert_array_equal(found["a"], np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(found["b"], np.arange(4, 12).reshape(2, 4).T)
    assert found["c"].dtype == np.float16 and found["c"].tolist() == [0.5, -2]


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_no_code_is_executed(tmp_path, write):
    """Whatever a pickle can ask for: a call, an attribute, an extension's class."""
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(touched),))

    for content, asked in (
        (pickle.dumps({"a": Evil()}, 2), ".*mkdir"),
        (b"cos\nsystem\n(S'touch " + str(touched).encode() + b"'\ntR.", "os.system"),
        (pickle.dumps({"a": print}, 4), "builtins.print"),
        (pickled({"a": Global("torch._utils", "_rebuild_device_tensor_from_numpy")}), "torch._utils._rebuild_device"),
    ):
        with pytest.raises(UserError, match=rf"a\.th: cannot be read .*asks for {asked}.*not executed"):
            read_torch(write(tmp_path / "a.th", content))
    assert not touched.exists()


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    for reach in ((0, (13,), (1,)), (8, (5,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2,), (1 << 40,))):
        with pytest.raises(UserError, match=r"a\.th: cannot be read as a checkpoint of torch"):
            read_torch(write_zip(tmp_path / "a.th", pickled({"a": Tensor(FLOATS, *reach)})))


def test_what_is_no_state_dict_is_named(tmp_path):
    for other in ({"best_state": STATE}, {"a": 3}, [1], FLOATS):
        with pytest.raises(UserError, match="something else than named tensors"):
            read_torch(write_zip(tmp_path / "a.th", pickled(other)))
    for content in (b"", b"not a checkpoint", b"\x80\x02K\x01.", bytes(1_000), pickle.dumps("x", 5)):
        (tmp_path / "b.th").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.th: cannot be read as a checkpoint of torch \(.+\)"):
            read_torch(tmp_path / "b.th")
    for kind in ("O", "|O8", None):  # NumPy has kinds that are more than numbers
        stored = pickled({"a": Tensor(FLOATS, 0, (3,), (1,))}).replace(
            b"ctorch\nFloatStorage\n", pickle.dumps(kind, 2)[2:-1]
        )
        with pytest.raises(UserError, match="has a storage of kind"):
            read_torch(write_zip(tmp_path / "c.th", stored))
    with zipfile.ZipFile(tmp_path / "d.th", "w"):
        pass
    with pytest.raises(UserError, match="no data.pkl in it"):
        read_torch(tmp_path / "d.th")
    with pytest.raises(UserError, match="none"):
        read_torch(tmp_path / "none.th")


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_a_file_cut_anywhere_or_spoiled_is_an_error(tmp_path, write):
    whole = write(tmp_path / "a.th", pickled(STATE)).read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "a.th").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.th: cannot be read"):
            read_torch(tmp_path / "a.th")
    if write is write_zip:  # its parts carry checksums
        at = whole.index(FLOATS.values.tobytes()) + 9
        (tmp_path / "a.th").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="CRC"):
            read_torch(tmp_path / "a.th")


def test_the_pickles_of_these_tests_are_as_torch_writes_them():
    """The names and the persistent ids that torch's own files have, by their opcodes."""
    asked = {argument for opcode, argument, _ in pickletools.genops(pickled(STATE)) if opcode.name == "GLOBAL"}
    assert asked == {
        "torch FloatStorage", "torch HalfStorage", "torch._utils _rebuild_tensor_v2", "collections OrderedDict",
    }  # fmt: skip
