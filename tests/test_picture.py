import numpy as np
import pytest
from matplotlib.image import imread

from l2m_jax.config import UserError
from l2m_jax.picture import Label, draw_song, draw_spectrograms, stagger

RATE = 24_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def test_a_song_with_labels_and_long_lyrics(tmp_path):
    lyrics = "\n".join(f"line {i}" for i in range(40))
    draw_song(tmp_path / "short.png", TONE, RATE, "la")
    draw_song(tmp_path / "song.png", TONE, RATE, lyrics, {"sung": [Label("la", 0.1, 0.9)]}, "title")
    short, long = imread(tmp_path / "short.png"), imread(tmp_path / "song.png")
    assert long.shape[0] > short.shape[0]  # a row of labels and twelve lines more


def test_the_spectrogram_shows_the_tone_where_it_is(tmp_path):
    """Brightest row of the 440 Hz picture lies above that of a 220 Hz one."""
    low = (0.5 * np.sin(2 * np.pi * 220 * np.arange(RATE) / RATE)).astype(np.float32)
    rows = []
    for name, sound in (("high", TONE), ("low", low)):
        draw_spectrograms(tmp_path / f"{name}.png", {"": sound}, RATE)
        picture = imread(tmp_path / f"{name}.png")[:, 200:800, :3]
        coloured = picture.sum(-1) * (np.ptp(picture, axis=-1) > 0.05)  # not the white margins
        rows.append(coloured.mean(1).argmax())
    assert rows[0] < rows[1]


def test_labels_that_would_overlap_are_put_lower(tmp_path):
    labels = [Label("la", 0, 0.1), Label("luna", 0.3, 0.4), Label("si", 0.5, 0.9), Label("do", 0.8, 1)]
    assert stagger(labels, 0.01) == [0, 0, 0, 1]  # as long as they are sung
    assert stagger(labels, 0.09) == [0, 0, 1, 0]  # as long as they are written
    assert stagger(labels, 1) == [0, 1, 2, 3]
    assert stagger([], 1) == []
    long = np.tile(TONE, 60)
    many = [Label("la", i / 4, i / 4 + 0.2) for i in range(240)]
    draw_song(tmp_path / "song.png", TONE, RATE, "la", {"words": labels})
    draw_song(tmp_path / "long.png", long, RATE, "la", {"words": many})
    assert imread(tmp_path / "long.png").shape[1] > 1.2 * imread(tmp_path / "song.png").shape[1]


def test_a_contact_sheet_has_columns(tmp_path):
    sounds = {f"{i}": TONE[: 2_000 * i] for i in range(5)}  # the first one empty
    for columns in (1, 2):
        draw_spectrograms(tmp_path / f"{columns}.png", sounds, RATE, columns)
    one, two = imread(tmp_path / "1.png").shape, imread(tmp_path / "2.png").shape
    assert two[0] < 0.7 * one[0] and two[1] >= one[1] * 0.9


def test_names_and_lyrics_are_drawn_as_they_are(tmp_path):
    """A font without emoji is no reason to complain, and dollars are no formula."""
    draw_song(tmp_path / "song.png", TONE, RATE, "la 🌙 $x^$ {", title="🎵 $a^$ {")
    draw_spectrograms(tmp_path / "songs.png", {"🎵 $a^$ {": TONE}, RATE)


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_very_short_sounds(tmp_path, samples):
    draw_song(tmp_path / "song.png", TONE[:samples], RATE, "la")
    assert (tmp_path / "song.png").stat().st_size > 1000


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"song\.png cannot be written"):
        draw_song(tmp_path / "nowhere" / "song.png", TONE, RATE, "la")
