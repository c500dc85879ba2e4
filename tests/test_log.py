"""What a training tells, in metrics.jsonl and in TensorBoard."""

import io
import json

import numpy as np
import pytest
import soundfile
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from l2m_jax.config import UserError
from l2m_jax.log import Log


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_can_read_what_is_told(trained, singer_run):
    told = {}
    for path in trained.glob("tensorboard/events*"):
        for event in events(path):
            told |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for line in lines(trained):
        assert told["loss", line["step"]] == np.float32(line["loss"])
    (path,) = singer_run.glob("tensorboard/events*")
    (sample,) = (v.audio for e in events(path) for v in e.summary.value if v.tag.startswith("sample") and e.step == 2)
    heard, rate = soundfile.read(io.BytesIO(sample.encoded_audio_string))
    kept, _ = soundfile.read(singer_run / "samples" / "0000002.wav")
    assert rate == sample.sample_rate == 24_000
    np.testing.assert_allclose(heard, kept, atol=1e-4)


def events(path):
    """TFRecord: length, its checksum, the event, its checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        yield Event.FromString(content[at + 12 : at + 12 + size])
        at += 16 + size


def test_metrics_stand_where_there_is_no_room_to_write_them_anew(tmp_path, monkeypatch):
    def full(path, content):
        raise UserError("no room")

    monkeypatch.setattr("l2m_jax.log.write_atomic", full)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    Log(tmp_path, 2, 10, 1, Console(quiet=True)).close()  # nothing to drop, nothing to write
    with pytest.raises(UserError, match="no room"):
        Log(tmp_path, 1, 10, 1, Console(quiet=True))
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize("sides", [(), (2,)])
def test_sample_songs_are_heard_on_both_sides(tmp_path, sides):
    sound = np.random.default_rng(0).uniform(-1, 1, (4800, *sides)).astype(np.float32)
    log = Log(tmp_path, 0, 10, 1, Console(quiet=True))
    log.audio(1, sound, 48_000)
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    (sample,) = (value.audio for event in events(path) for value in event.summary.value)
    heard, rate = soundfile.read(io.BytesIO(sample.encoded_audio_string))
    assert rate == 48_000 and heard.shape == sound.shape
    np.testing.assert_allclose(heard, sound, atol=1e-4)


def test_metrics_of_steps_that_are_trained_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(5)) + '{"step": 5, "lo')
    log = Log(tmp_path, 3, 10, 1, Console(quiet=True))
    log.metrics(3, {"loss": 2.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]
