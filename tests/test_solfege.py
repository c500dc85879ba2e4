"""The corpus of the project: deterministic, in the dataset layout, and resumable."""

import filecmp
import itertools

import numpy as np
import pytest
import soundfile

from l2m_jax import solfege
from l2m_jax.config import UserError
from l2m_jax.songs import scan_songs

RATE = 24_000


def test_corpus_is_a_clean_dataset_of_its_own_layout(tmp_path):
    assert solfege.make_solfege(tmp_path / "songs", 12, seed=3, notes=(4, 6)) == 12
    songs, bad = scan_songs(tmp_path / "songs")
    assert not bad and [song.id for song in songs] == [f"song_{i:04d}" for i in range(1, 13)]
    for song in songs:
        samples, rate = soundfile.read(song.audio)
        words = solfege.words_of(song.lyrics).split()
        assert rate == RATE and song.genre in solfege.GENRES and 4 <= len(words) <= 6
        assert np.abs(samples).max() == pytest.approx(solfege.PEAK, abs=1e-3)
        assert samples[: RATE // 10].max() == 0 and samples[1 - RATE // 5 :].max() == 0  # silence around the song
        starts, ends, line_ends = song.word_times.T
        assert starts[0] == pytest.approx(solfege.LEAD_IN) and (starts[1:] - ends[:-1] > 0.04).all()
        assert ((ends - starts > 0.179) & (ends - starts < 0.401)).all()
        assert np.isfinite(line_ends).sum() == len(song.lyrics.splitlines()) and line_ends[-1] == ends[-1]


def test_a_song_depends_on_seed_and_index_alone(tmp_path):
    solfege.make_solfege(tmp_path / "few", 2, seed=5)
    solfege.make_solfege(tmp_path / "more", 4, seed=5)
    solfege.make_solfege(tmp_path / "other", 2, seed=6)
    for name in ("lyrics.txt", "genre.txt", "words.csv", "audio.flac"):
        few, more, other = (tmp_path / corpus / "song_0002" / name for corpus in ("few", "more", "other"))
        assert filecmp.cmp(few, more, shallow=False)
        assert name == "genre.txt" or not filecmp.cmp(few, other, shallow=False)


def test_resume_makes_only_what_is_missing(tmp_path):
    out = tmp_path / "songs"
    solfege.make_solfege(out, 3)
    whole = (out / "song_0002" / "audio.flac").read_bytes()
    kept = (out / "song_0001" / "audio.flac").stat().st_mtime_ns
    (out / "song_0002").rename(out / ".song_0002.part")  # as if it had been interrupted there
    (out / ".song_0002.part" / "audio.flac").write_bytes(b"half")
    assert solfege.make_solfege(out, 4) == 2
    assert (out / "song_0002" / "audio.flac").read_bytes() == whole
    assert (out / "song_0001" / "audio.flac").stat().st_mtime_ns == kept
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_folder_with_anything_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="already holds something else"):
        solfege.make_solfege(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    out = tmp_path / "songs"
    solfege.make_solfege(out, 1, seed=1)
    for other in ({"seed": 2}, {"notes": (5, 10)}, {"sections": 1.0}, {"exclude": {"do re mi fa"}}, {"repeats": 0.3}):
        with pytest.raises(UserError, match=r'another corpus, .*"seed": 1'):
            solfege.make_solfege(out, 1, **{"seed": 1, **other})
    with pytest.raises(UserError, match="notes are 5 to 4; allowed: 1"):
        solfege.make_solfege(tmp_path / "never", 1, notes=(5, 4))
    with pytest.raises(UserError, match="notes are 1 to 3; .* up to 4"):
        solfege.make_solfege(tmp_path / "never", 1, notes=(1, 3), sections=0.5)
    with pytest.raises(UserError, match="sections is 2; allowed: a share"):
        solfege.make_solfege(tmp_path / "never", 1, sections=2)
    with pytest.raises(UserError, match="repeats is -1; allowed: a share of the syllables"):
        solfege.make_solfege(tmp_path / "never", 1, repeats=-1)
    with pytest.raises(UserError, match="songs is 0 and seed 0; allowed: 1 song"):
        solfege.make_solfege(tmp_path / "never", 0)
    assert not (tmp_path / "never").exists()


def test_held_out_lyrics_are_never_sung():
    trained = {solfege.words_of(solfege.random_lyrics(np.random.default_rng(i), 2, 2)) for i in range(60)}
    drawn = [solfege.words_of(solfege.random_lyrics(np.random.default_rng((1, i)), 2, 2)) for i in range(60)]
    again = [
        solfege.words_of(solfege.random_lyrics(np.random.default_rng((1, i)), 2, 2, exclude=trained)) for i in range(60)
    ]
    assert 0 < len(trained) < 49 and trained.intersection(drawn) and not trained.intersection(again)
    with pytest.raises(UserError, match="outside the 7 excluded"):
        solfege.random_lyrics(np.random.default_rng(0), 1, 1, exclude=set(solfege.SYLLABLES))


def test_sections_repeat_the_chorus():
    for seed in range(20):
        lyrics = solfege.random_lyrics(np.random.default_rng(seed), 8, 40, sections=True)
        verse, chorus, second, again = (part.split("\n", 1)[1] for part in ("\n" + lyrics).split("\n[")[1:])
        assert chorus.split() == again.split() and verse.split() and second.split()
        assert lyrics.count("[verse]\n") == lyrics.count("[chorus]\n") == 2
        assert 8 <= len(solfege.words_of(lyrics).split()) <= 40
    samples, times = solfege.sing(lyrics, "waltz", np.random.default_rng(0))
    assert len(times) == len(solfege.words_of(lyrics).split()) and np.isfinite(samples).all()


def test_a_share_of_the_songs_has_sections():
    lyrics = [solfege.make_song(3, index, (3, 5), sections=0.7)[0] for index in range(40)]
    tagged = [text for text in lyrics if "[chorus]" in text]
    assert 20 < len(tagged) < 36 and all(len(solfege.words_of(text).split()) >= 4 for text in tagged)
    assert any(len(solfege.words_of(text).split()) == 3 for text in lyrics)


def test_syllables_come_again_as_often_as_asked():
    for repeats in (0.0, 0.3, 1.0):
        drawn = [solfege.make_song(3, i, (12, 16), repeats=repeats)[0] for i in range(60)]
        pairs = [pair for text in drawn for pair in itertools.pairwise(solfege.words_of(text).split())]
        again = np.mean([first == second for first, second in pairs])
        assert again == pytest.approx(repeats + (1 - repeats) / 7, abs=0.05), repeats


def test_rests_and_a_free_tempo():
    """What the benchmark asks of its songs of 8 to 16 notes."""
    counts, rests, spreads, beats = set(), 0, [], []
    for index in range(12):
        lyrics, genre, _, times = solfege.make_song(100, index, (8, 16), sections=1.0)
        counts.add(len(solfege.words_of(lyrics).split()))
        lengths, gaps = times[:, 1] - times[:, 0], times[1:, 0] - times[:-1, 1]
        rests += np.count_nonzero(gaps > solfege.GAP + 0.08)
        spreads.append(np.std(lengths) / np.mean(lengths))
        beats.append(np.mean(lengths) / solfege.GENRES[genre].beat)
    assert counts <= set(range(8, 17)) and len(counts) > 4
    assert 5 < rests < 30 and min(spreads) > 0.02 and np.ptp(beats) > 0.05


def test_scale_and_genres():
    assert solfege.NOTE_HZ["do"] == pytest.approx(261.63, abs=0.01)
    assert solfege.NOTE_HZ["la"] == 440 and solfege.NOTE_HZ["si"] == pytest.approx(493.88, abs=0.01)
    times = {genre: solfege.sing("do re mi fa", genre, np.random.default_rng(0))[1] for genre in solfege.GENRES}
    tempo = {genre: np.mean(rows[:, 1] - rows[:, 0]) for genre, rows in times.items()}
    assert tempo["techno"] < tempo["march"] < tempo["waltz"] < tempo["ballad"]
    with pytest.raises(UserError, match="genre is 'polka'; allowed: march, waltz, ballad, techno"):
        solfege.sing("do", "polka", np.random.default_rng(0))
    with pytest.raises(UserError, match="hold \\['ut'\\]; allowed: do re mi"):
        solfege.sing("do ut", "march", np.random.default_rng(0))
