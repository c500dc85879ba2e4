"""What a song is asked for, and files of requests."""

import dataclasses
import json
from pathlib import Path

import pytest

from l2m_jax.config import SampleConfig, UserError
from l2m_jax.request import Request, pack, read_requests, read_text


def test_a_request_is_flat_and_its_rule_is_a_plain_one():
    request = Request(lyrics="la", seed=3, temperature=0.4, top_k=7)
    assert request.rule == SampleConfig(temperature=0.4, top_k=7) and type(request.rule) is SampleConfig
    assert dataclasses.asdict(request)["lyrics"] == "la" and dataclasses.asdict(request)["top_k"] == 7


@pytest.mark.parametrize(
    "change, says",
    [
        ({"seed": -1}, "seed is -1; allowed: 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seconds": 0.0}, "seconds is 0; allowed: above 0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"min_seconds": -1.0}, "min-seconds is -1; allowed: 0 and above"),
        ({"min_seconds": float("nan")}, "min-seconds is nan"),
        ({"min_seconds": 2.0, "seconds": 1.0}, "min-seconds 2 is more than seconds 1"),
        ({"from_seconds": 1.0}, "from 1 needs a prompt"),
        ({"from_seconds": 0.0, "prompt": "a.wav"}, "from is 0; allowed: above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        Request(lyrics="la", **change)


def test_requests_are_packed_with_their_like():
    def ask(**values):
        return Request(lyrics="la", **values)

    requests = [ask(), ask(top_k=3), ask(seconds=5.0), ask(prompt="a.wav"), ask(seed=9), ask(seconds=2.0), ask(top_k=3)]
    packed = pack(requests, 2)
    assert sorted(i for group in packed for i in group) == list(range(7)) and max(map(len, packed)) == 2
    assert {tuple(group) for group in packed} == {(5, 2), (0, 4), (3,), (1, 6)}
    assert pack([], 2) == []


def test_a_file_of_requests(tmp_path):
    path = tmp_path / "requests.jsonl"
    (tmp_path / "words.txt").write_text("do re\n", encoding="utf-8")
    lines = [
        {"id": "one 🌙", "lyrics": "la", "temperature": 1},
        {"id": "two", "lyrics": str(tmp_path / "words.txt"), "seed": 4, "top_k": 3},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n"
    path.write_bytes(text.encode())
    one, two = read_requests(path, Request(genre="march", top_k=9, seed=1))
    assert (one.number, one.name, two.number, two.name) == (1, "one 🌙", 3, "two")
    assert one.request == Request(lyrics="la", genre="march", top_k=9, seed=1, temperature=1)
    assert two.request == Request(lyrics="do re\n", genre="march", top_k=3, seed=4)


@pytest.mark.parametrize(
    "line, name, says",
    [
        (b"la", "line-2", "is not JSON"),
        (b"\xff{}", "line-2", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "line-2", "is not JSON"),
        (b"[1]", "line-2", "is not a JSON object"),
        (b'{"lyrics": "la"}', "line-2", "id is None; a text is needed"),
        (b'{"id": 7, "lyrics": "la"}', "line-2", "id is 7; a text is needed"),
        (b'{"id": "", "lyrics": "la"}', "line-2", "id is ''"),
        (b'{"id": "../up", "lyrics": "la"}', "line-2", "'../up' is no plain file name"),
        (b'{"id": ".hidden", "lyrics": "la"}', "line-2", "'.hidden' is no plain file name"),
        (b'{"id": "a\\u0000b", "lyrics": "la"}', "line-2", "is no plain file name"),
        (b'{"id": "a\\ud800", "lyrics": "la"}', "line-2", "is no plain file name"),
        (b'{"id": "a.error", "lyrics": "la"}', "line-2", "is no plain file name"),
        (b'{"id": "' + b"a" * 201 + b'", "lyrics": "la"}', "line-2", "is no plain file name"),
        (b'{"id": "FIRST", "lyrics": "la"}', "line-2", "id 'FIRST' is that of line 1 already"),
        (b'{"id": "a", "lirics": "la"}', "a", "unknown key 'lirics'; known: temperature, "),
        (b'{"id": "a", "lyrics": 3}', "a", "lyrics is 3; needed: str"),
        (b'{"id": "a", "lyrics": "la", "temperature": "hot"}', "a", "temperature is 'hot'; needed: float"),
        (b'{"id": "a", "lyrics": "la", "seed": 1.5}', "a", "seed is 1.5; needed: int"),
        (b'{"id": "a", "lyrics": "la", "seed": true}', "a", "seed is True; needed: int"),
        (b'{"id": "a", "lyrics": "la", "seconds": NaN}', "a", "seconds is nan"),
        (b'{"id": "a", "lyrics": "la", "top_p": 3}', "a", "top-p is 3; allowed"),
        (b'{"id": "a", "lyrics": "lost.txt"}', "a", "lost.txt: no such file"),
    ],
)
def test_a_line_with_a_mistake_is_said_and_the_others_stand(tmp_path, line, name, says):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"id": "first", "lyrics": "la"}\n' + line + b'\n{"id": "last", "lyrics": "la"}')
    first, bad, last = read_requests(path, Request())
    assert isinstance(first.request, Request) and isinstance(last.request, Request)
    assert (bad.number, bad.name) == (2, name) and says in str(bad.request) and "\n" not in str(bad.request)


def test_a_number_beyond_all_measure_is_no_crash(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"id": "a", "lyrics": "la", "seconds": 1' + 400 * "0" + "}\n")
    (line,) = read_requests(path, Request())
    assert "seconds is inf" in str(line.request)


@pytest.mark.parametrize("content, says", [(None, "cannot be read .No such file"), (b"\n \n", "holds no requests")])
def test_a_file_without_requests_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "requests.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_requests(tmp_path / "requests.jsonl", Request())


def test_lyrics_are_a_file_or_the_text_itself(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffla luna 🌙\r\n".encode())
    assert read_text(str(tmp_path / "a.txt")) == "la luna 🌙\r\n"
    for text in ("la luna", "la\nluna.txt", "", "x" * 5000, "a\0b", "/"):
        assert read_text(text) == text
    (tmp_path / "b.txt").write_bytes("corazón".encode("latin-1"))
    with pytest.raises(UserError, match="b.txt: byte 5 is not UTF-8; save the file as UTF-8"):
        read_text(str(tmp_path / "b.txt"))


def test_lyrics_that_cannot_be_read_are_not_sung_by_their_name(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("la")

    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(UserError, match="a.txt: cannot be read .Permission denied."):
        read_text(str(tmp_path / "a.txt"))
