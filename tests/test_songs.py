"""A folder of songs is read whole, and what is wrong with a song is said."""

import os

import numpy as np
import pytest

from l2m_jax.config import UserError
from l2m_jax.lyrics import parse_lyrics
from l2m_jax.songs import scan_songs

HEADER = "word_start,word_end,line_end\n"
GOOD = HEADER + "0.5,1,nan\n1.25,2,2\n"


@pytest.fixture
def add(tmp_path):
    def add(name, audio=("audio.mp3",), **texts):
        folder = tmp_path / name
        folder.mkdir()
        for file in audio:
            (folder / file).write_bytes(b"")
        for file, text in {"lyrics": "la luna", **texts}.items():
            if text is not None:
                content = text if isinstance(text, bytes) else text.encode()
                (folder / f"{file}.{'csv' if file == 'words' else 'txt'}").write_bytes(content)
        return tmp_path

    return add


def test_songs_are_read_whole_and_in_natural_order(add):
    for name in ("song_10", "song_2", "Ünï 曲 b", "song_2b"):
        root = add(name)
    add("song_1", audio=("Grabación 1.FLAC",), lyrics="[verse]\nla luna\n", genre="\ufeff Bossa nova \n", words=GOOD)
    add(".hidden", lyrics=None)
    (root / "README.md").write_text("not a song")
    (root / "song_1" / "._audio.mp3").write_bytes(b"")  # what macOS leaves on foreign disks
    songs, bad = scan_songs(root)
    assert not bad and [song.id for song in songs] == ["song_1", "song_2", "song_2b", "song_10", "Ünï 曲 b"]
    first, second = songs[:2]
    assert first.lyrics == "[verse]\nla luna\n" and first.genre == "Bossa nova"
    assert first.audio == root / "song_1" / "Grabación 1.FLAC" and first.folder == root / "song_1"
    assert first.word_times.dtype == np.float32
    np.testing.assert_array_equal(first.word_times, np.float32([[0.5, 1, np.nan], [1.25, 2, 2]]))
    assert second.genre == "" and second.word_times is None


BAD = {
    "no lyrics": ({"lyrics": None}, "lyrics.txt is missing"),
    "empty lyrics": ({"lyrics": " \n"}, "lyrics.txt: no words"),
    "latin-1 lyrics": ({"lyrics": "día".encode("latin-1")}, "lyrics.txt: byte 1 is not UTF-8; save the file as UTF-8"),
    "latin-1 genre": ({"genre": "canción".encode("latin-1")}, "genre.txt: byte 5 is not UTF-8"),
    "no audio": (
        {"audio": ("audio.aac", "cover.jpg")},
        "one audio file is needed (.mp3, .flac, .ogg, .wav), found: none",
    ),
    "two audios": ({"audio": ("b.mp3", "a.wav")}, "found: a.wav, b.mp3"),
    "too few rows": ({"words": HEADER + "0,1,nan\n"}, "has 1 rows, lyrics.txt 2 words ('la luna' ...)"),
    "too many rows": ({"words": GOOD + "3,4,4\n"}, "has 3 rows, lyrics.txt 2 words"),
    "no header": ({"words": "0,1,nan\n1,2,2\n"}, "first line is '0,1,nan'; it must be word_start,word_end,line_end"),
    "empty words": ({"words": ""}, "first line is ''"),
    "a word for a number": ({"words": HEADER + "0,1,nan\none,2,2\n"}, "line 3: 'one,2,2' is not three numbers"),
    "two columns": ({"words": HEADER + "0,1\n1,2\n"}, "line 2: '0,1' is not three numbers"),
    "binary words": ({"words": b"\xff\xfe\x00"}, "words.csv: byte 0 is not UTF-8"),
    "nan start": ({"words": HEADER + "nan,1,nan\n1,2,2\n"}, "line 2: 'nan,1,nan' is not 0 <= word_start <= word_end"),
    "infinite end": ({"words": HEADER + "0,inf,nan\n1,2,2\n"}, "line 2"),
    "negative": ({"words": HEADER + "-1,1,nan\n1,2,2\n"}, "line 2"),
    "negative line end": (
        {"words": HEADER + "0,1,nan\n1,2,-2\n"},
        "line 3: line_end is -2.0; allowed: seconds, or nan",
    ),
    "end before start": ({"words": HEADER + "0,1,nan\n2,1.5,2\n"}, "line 3: '2,1.5,2' is not 0 <= word_start"),
    "decreasing": ({"words": HEADER + "1,2,nan\n0.5,2,2\n"}, "line 3: word_start 0.5 is before 1.0 of the line above"),
}


def test_each_mistake_is_said_and_stops_no_other_song(add):
    root = add("good")
    for name, (files, _) in BAD.items():
        add(name, **files)
    songs, bad = scan_songs(root)
    assert [song.id for song in songs] == ["good"] and [song.id for song in bad] == sorted(BAD)
    for song in bad:
        assert BAD[song.id][1] in song.reason and "\n" not in song.reason


def test_overlapping_words_and_instrumentals_are_songs(add):
    add("overlap", words=HEADER + "0,2,nan\n1,1.5,1.5\n")
    songs, bad = scan_songs(add("tune", lyrics="[instrumental]\n", words=HEADER))
    assert not bad and [song.word_times.shape for song in songs] == [(2, 3), (0, 3)]


def test_a_folder_without_songs_is_an_error(tmp_path):
    (tmp_path / "audio.mp3").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    with pytest.raises(UserError, match=r"no song folders; put each song in its own: song_001/lyrics.txt"):
        scan_songs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        scan_songs(tmp_path / "absent")


def test_real_songs_scan_clean():
    if not (folder := os.environ.get("L2M_SONGS")):
        pytest.skip("L2M_SONGS is unset: it names a folder of real songs")
    songs, bad = scan_songs(folder)
    assert songs and not bad
    for song in songs:
        if song.word_times is not None:
            assert song.word_times.shape == (len(parse_lyrics(song.lyrics).words), 3)
            assert song.word_times.dtype == np.float32
