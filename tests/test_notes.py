"""Notes are read back from the sound as they were sung."""

import numpy as np
import pytest

from l2m_jax import codec, notes, solfege, weights

RATE = 24_000
SONGS = [solfege.make_song(11, index) for index in range(32)]


def accuracy(samples, lyrics, rate=RATE):
    return notes.note_accuracy(
        [note.syllable for note in notes.track_notes(samples, rate)], solfege.words_of(lyrics).split()
    )


def test_tracked_notes_are_the_lyrics_in_every_genre():
    for genre in solfege.GENRES:
        mean = np.mean([accuracy(samples, lyrics) for lyrics, style, samples, _ in SONGS if style == genre])
        print(f"{genre}: note accuracy {mean:.4f}; tolerance 0.99")
        assert mean >= 0.99


def test_notes_survive_the_shipped_codec():
    shipped = weights.load_codec()
    coded = [
        (codec.decode(shipped, codec.encode(shipped, samples, chunk=75), chunk=75), lyrics)
        for lyrics, _, samples, _ in SONGS[:24]
    ]
    mean = np.mean([accuracy(samples, lyrics) for samples, lyrics in coded])
    print(f"note accuracy after the codec {mean:.4f}; tolerance 0.97")
    assert mean >= 0.97


def test_tracked_times_and_pitches_are_those_of_the_words():
    late, over, cents = [], [], []
    for lyrics, _, samples, times in SONGS:
        words, sung = solfege.words_of(lyrics).split(), notes.track_notes(samples, RATE)
        assert [note.syllable for note in sung] == words
        late += [note.start - start for note, start in zip(sung, times[:, 0])]
        over += [note.end - end for note, end in zip(sung, times[:, 1])]
        cents += [1200 * np.log2(note.hz / solfege.NOTE_HZ[note.syllable]) for note in sung]
    onset, end = 1000 * np.median(np.abs(late)), 1000 * np.median(np.abs(over))
    cent = np.abs(cents).max()
    print(
        f"median error: onset {onset:.1f} ms, end {end:.1f} ms; tolerance 30 ms. Pitch: {cent:.0f} cents; tolerance 20"
    )
    assert onset < 30 and end < 30 and cent <= 20


def test_a_repeated_note_is_as_many_notes():
    for genre in solfege.GENRES:
        for word in solfege.SYLLABLES:
            samples, _ = solfege.sing(" ".join([word] * 4), genre, np.random.default_rng(0))
            assert [note.syllable for note in notes.track_notes(samples, RATE)] == [word] * 4


def test_noise_and_another_rate_do_not_matter():
    rng = np.random.default_rng(0)
    for lyrics, _, samples, _ in SONGS[:8]:
        noise = rng.standard_normal(len(samples)) * samples.std() * 0.5
        assert accuracy(samples + noise, lyrics) == 1
    samples, _ = solfege.sing("do la mi mi si", "march", rng, rate=44_100)
    assert accuracy(samples, "do la mi mi si", 44_100) == 1


def test_wrong_notes_are_heard():
    samples, _ = solfege.sing("do re mi fa", "waltz", np.random.default_rng(0))
    assert accuracy(samples, "do re mi sol") == 0.75
    half_tone_up = np.interp(np.arange(0, len(samples) - 1, 2 ** (2 / 12)), np.arange(len(samples)), samples)
    assert [note.syllable for note in notes.track_notes(half_tone_up, RATE)][:2] == ["re", "mi"]


def test_silence_and_noise_hold_no_notes():
    assert notes.track_notes(np.zeros(0), 44_100) == notes.track_notes(np.zeros(RATE), RATE) == []
    assert notes.track_notes(np.random.default_rng(0).standard_normal(2 * RATE) * 0.1, RATE) == []


def test_note_accuracy_is_one_minus_edits_per_word():
    lyric = "do re mi fa".split()
    assert notes.note_accuracy(lyric, lyric) == 1
    assert notes.note_accuracy("do re fa".split(), lyric) == 0.75  # one left out
    assert notes.note_accuracy("do re re mi fa".split(), lyric) == 0.75  # one too many
    assert notes.note_accuracy("fa mi re do".split(), lyric) == 0
    assert notes.note_accuracy([], lyric) == 0 and notes.note_accuracy([], []) == 1
    assert notes.note_accuracy(["do"] * 40, lyric) == 0


@pytest.mark.parametrize("offset", [0, 137])
def test_onsets_do_not_depend_on_the_grid_of_frames(offset):
    samples, times = solfege.sing("sol sol do", "ballad", np.random.default_rng(0))
    sung = notes.track_notes(np.pad(samples, (offset, 0)), RATE)
    assert np.abs([note.start - offset / RATE for note in sung] - times[:, 0]).max() < 0.02
