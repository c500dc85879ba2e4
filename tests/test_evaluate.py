"""`l2m evaluate`, on a run that has hardly learnt a thing."""

import json
import shutil

import numpy as np
import pytest
from conftest import make_prepared
from rich.console import Console

from l2m_jax.align import Reading
from l2m_jax.cli import main
from l2m_jax.data import Dataset, read_record
from l2m_jax.evaluate import _alignment
from l2m_jax.listening import spread
from l2m_jax.singer import load


def l2m(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    return caught.value.code


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, singer_run, sung):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    command = ["evaluate", singer_run, "--data", sung, "--out", out, "--songs", 4, "--batch", 4, "--pictures", 1]
    assert l2m(*command) == 0
    return out, command


def test_every_part_is_there(evaluated, singer_run, sung):
    out, _ = evaluated
    told = json.loads((out / "evaluation.json").read_text())
    assert told["step"] == 2 and told["songs"] == 6 and told["run"] == str(singer_run)
    assert (
        told["likelihood"]["songs"] == 6 and told["likelihood"]["bits_per_code"]["right"]["all_codebooks"]["value"] > 5
    )
    words = [len(read_record(path)[0].word_times) for path in sorted((sung / "records").iterdir())]
    cut = [line["frames"] > 60 for line in map(json.loads, (sung / "songs.jsonl").read_text().splitlines())]
    aligned = told["alignment"]
    assert aligned["chosen_on"]["songs"] == 2 and aligned["songs"] == 4 and aligned["heads"]
    assert aligned["songs_cut"] == 4 and all(cut) and 4 <= aligned["attention"]["words"] < sum(words)
    assert told["generation"]["longer_than_the_window"] == 4
    found = told["generation"]
    assert found["songs"] == 4 and found["solfege"] and found["failed"] == 0
    ceiling, generated = (found[who]["notes"]["note_accuracy"]["value"] for who in ("ceiling", "generated"))
    assert ceiling > 0.7 > generated  # the true songs as far as the window goes, which is not to their end
    assert found["ceiling"]["frechet"]["distance"] is None and found["generated"]["frechet"]["distance"] > 0
    assert found["ceiling"]["note_starts_against_word_times"]["median_ms"] < 50
    assert [song["file"] for song in found["each_song"]] == [f"songs/0000{i}.wav" for i in (1, 2, 4, 6)]
    assert (out / "songs" / "00001.png").exists() and not (out / "songs" / "00002.png").exists()
    assert "| notes right |" in (out / "evaluation.md").read_text()


def test_the_songs_of_the_training_are_warned_of(evaluated):
    assert "trained on: these figures are not of held-out songs" in (evaluated[0] / "evaluation.md").read_text()


def test_a_rerun_sings_only_what_is_missing(evaluated, tmp_path, capsys):
    out, command = evaluated
    again = shutil.copytree(out, tmp_path / "again")
    (again / "songs" / "00002.npz").unlink()
    reference = ["--reference", command[3], "--only", "generation"]
    assert l2m(*command[:5], again, *command[6:], *reference) == 0
    said = capsys.readouterr().out
    assert "4 songs of 4 in" in said and "(1 new, 0 failed)" in said
    told = json.loads((again / "evaluation.json").read_text())
    assert told["generation"]["reference"]["songs"] == 6
    assert told["generation"]["ceiling"]["frechet"]["distance"] is None  # they are the same songs
    before = json.loads((out / "evaluation.json").read_text())
    assert told["generation"]["each_song"] == before["generation"]["each_song"]
    # What was not asked for stays.
    assert told["likelihood"] == before["likelihood"] and told["alignment"] == before["alignment"]
    assert "## Bits per code of 6 songs" in (again / "evaluation.md").read_text() and "Word starts by attention" in said


def test_the_sound_of_songs_is_a_reference_too(evaluated, songs, tmp_path):
    out, command = evaluated
    again = shutil.copytree(out, tmp_path / "again")
    assert l2m(*command[:5], again, *command[6:], "--reference", songs, "--only", "generation") == 0
    told = json.loads((again / "evaluation.json").read_text())["generation"]
    assert told["reference"] == {"data": f"the sound of {songs}", "songs": 6}
    assert told["ceiling"]["frechet"]["distance"] > 0


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--data /nowhere", "/nowhere is not a prepared dataset"),
        ("--data OTHER", "OTHER was prepared with other encoders than the songs of RUN (codec: "),
        ("--data DATA --valid OTHER", "OTHER was prepared with other encoders"),
        ("--data DATA --valid DATA", "holds the songs of --data: choose heads on others"),
        ("--data DATA --reference OTHER", "OTHER was prepared with other encoders"),
        ("--data DATA --reference /nowhere", "/nowhere: no such folder"),
        ("--data DATA --songs 0", "songs is 0; allowed: 1 and above"),
        ("--data DATA --only", "only"),
        ("--data DATA --sampling.top-p 2", "top-p is 2.0"),
        ("--data DATA --step 9", "has no checkpoint of step 9"),
    ],
)
def test_a_mistake_is_one_line(capsys, singer_run, sung, prepared, tmp_path, flags, says):
    for name, path in {"DATA": sung, "OTHER": prepared, "RUN": singer_run}.items():
        flags, says = flags.replace(name, str(path)), says.replace(name, str(path))
    assert l2m("evaluate", singer_run, "--out", tmp_path / "out", *flags.split()) == 2
    _, complained = capsys.readouterr()
    assert says in complained and "Traceback" not in complained
    assert not (tmp_path / "out").exists()


def test_heads_that_were_chosen_stand(singer_run, sung, tmp_path):
    """Not chosen anew, but on songs of the choice itself; without likelihood and word starts songs are read by them."""
    run = shutil.copytree(singer_run, tmp_path / "run")
    kept = {"step": 2, "heads": [[0, 1]], "blank": 0.3, "songs_fingerprint": "others"}
    for there, chosen in (
        (kept, 0),
        (kept | {"songs_fingerprint": Dataset(sung).fingerprint}, 2),
        (kept | {"step": 1}, 2),
    ):
        (run / "alignment.json").write_text(json.dumps(there))
        assert l2m("evaluate", run, "--data", sung, "--out", tmp_path / "out", "--only", "alignment") == 0
        told = json.loads((tmp_path / "out" / "evaluation.json").read_text())["alignment"]
        assert told["chosen_on"]["songs"] == chosen and told["songs"] == 6 - chosen
        assert chosen or (told["heads"] == [[0, 1]] and told["chosen_on"]["errors"] is None)


def test_songs_without_words_or_times_have_no_such_figures(singer_run, sung, tmp_path, capsys):
    made_with, records = Dataset(sung).made_with, []
    for path in sorted((sung / "records").iterdir())[:2]:
        record = read_record(path)[0]
        records.append(record._replace(lyrics="la luna", word_times=np.zeros((0, 3)), genre=""))
    data = make_prepared(tmp_path / "data", records, made_with)
    assert l2m("evaluate", singer_run, "--data", data, "--out", tmp_path / "out", "--songs", 1, "--pictures", 0) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["warnings"] == [] and told["alignment"]["note"].startswith("none: songs with word times")
    assert told["likelihood"]["gain_per_sung_word"]["lyrics_against_none"] is None
    assert told["likelihood"]["gain_per_code"]["lyrics_against_shuffled"]["all_codebooks"] is None
    reading = Reading(((0, 1),), 0.3)
    note, kept = _alignment(load(singer_run), Dataset(data), None, reading, Console(quiet=True))
    assert note["note"] == "none: songs with word times (words.csv) are needed" and kept == reading
    found = told["generation"]["generated"]
    assert found["notes"] is None and found["genre"] is None and not told["generation"]["solfege"]
    assert "-" in capsys.readouterr().out


def test_items_are_spread_evenly():
    assert spread(np.arange(10), 3).tolist() == [0, 4, 9] and spread(np.arange(3), 8).tolist() == [0, 1, 2]
    assert spread(np.arange(5), 1).tolist() == [0]
