"""The Beam pipeline, on its local runner, makes the dataset that `prepare` makes."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="needs the extra `beam`")

from l2m_jax.beam import TOLD, prepare_with_beam
from l2m_jax.config import UserError
from l2m_jax.data import Dataset, read_manifest
from l2m_jax.songs import BadSong

# What Beam and its dependencies warn of is not ours to mend.
pytestmark = [pytest.mark.filterwarnings("default")]


def assert_equal(ours: Dataset, theirs: Dataset):
    assert len(ours) == len(theirs) and ours.made_with == theirs.made_with
    assert (ours.longest, ours.genres) == (theirs.longest, theirs.genres)
    assert read_manifest(ours.folder) == read_manifest(theirs.folder)
    for i in range(len(ours)):
        for name, mine, other in zip(ours[i]._fields, ours[i], theirs[i]):
            np.testing.assert_array_equal(mine, other, err_msg=name)


def test_a_pipeline_makes_the_same_dataset_and_names_what_it_leaves_out(tmp_path, songs, sung, encoders):
    shutil.copytree(songs, tmp_path / "songs")
    (tmp_path / "songs" / "empty").mkdir()
    out = tmp_path / "out"
    done = prepare_with_beam(tmp_path / "songs", out, encoders)
    assert (done.songs, done.new, done.left_out) == (6, 6, [BadSong("empty", "lyrics.txt is missing")])
    assert_equal(Dataset(out), Dataset(sung))
    assert json.loads((out / "report.json").read_text())["left_out"][0]["id"] == "empty"
    assert not (out / TOLD).exists()

    (tmp_path / "songs" / "song_0002" / "genre.txt").write_text("polka\n")
    (tmp_path / "songs" / "song_0005").rename(tmp_path / "away")
    done = prepare_with_beam(tmp_path / "songs", out, encoders)
    assert (done.songs, done.new, done.gone) == (5, 1, ["song_0005"]) and len(Dataset(out)) == 5
    assert Dataset(out)[1].genre == "polka"


def test_a_pipeline_that_fails_is_one_line(tmp_path, songs, encoders):
    with pytest.raises(UserError, match="the Beam pipeline failed: Unexpected pipeline runner: NoRunner"):
        prepare_with_beam(songs, tmp_path / "out", encoders, "NoRunner")
    (tmp_path / "songs" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"number of generated examples is 0.*without --beam, l2m prepare says"):
        prepare_with_beam(tmp_path / "songs", tmp_path / "none", encoders)
