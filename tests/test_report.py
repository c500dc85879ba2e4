"""Figures as tables, files and plots."""

import io
import json

import pytest
from rich.console import Console

from l2m_jax.bootstrap import Estimate
from l2m_jax.config import UserError
from l2m_jax.likelihood import CONDITIONS, GAINS
from l2m_jax.report import plain, tabulate, write_report

SOME = Estimate(0.25, 0.125, 0.5, 4)
PER_CODE = {"all_codebooks": SOME, "each_codebook": [SOME, SOME]}
ERRORS = {"words": 9, "median_ms": 40.0, "mean_ms": 60.0, "within_100_ms": SOME, "within_300_ms": SOME}
GENRES = {"right": SOME, "confusion": {"march": {"march": 2, "waltz": 1}, "waltz": {"march": 0, "waltz": 1}}}
SOUND = {
    "ended_by_themselves": SOME,
    "notes": {"note_accuracy": SOME, "right_number_of_notes": None, "songs_without_a_mistake": SOME},
    "genre": GENRES,
    "frechet": {"distance": None, "windows": 12, "embedding": "40 bands"},
    "words": None,
}
FIGURES = {
    "run": "run", "step": 7, "data": "held|out", "songs": 4, "warnings": ["held_out was trained on"],
    "model": "0f", "songs_fingerprint": "1f", "made_with": {"codec": "2f"},
    "settings": {"songs": 4, "seed": 0, "sampling": {"temperature": 0.7}},
    "likelihood": {
        "songs": 4, "codes": 80, "sung_words": 9, "songs_cut": 1, "frames_outside_of_the_window": 5,
        "bits_per_code": dict.fromkeys(CONDITIONS, PER_CODE),
        "bits_of_the_end": dict.fromkeys(CONDITIONS),
        "gain_per_code": dict.fromkeys(GAINS, PER_CODE),
        "gain_per_sung_word": dict.fromkeys(GAINS, SOME),
        "over_time": {
            "starts_s": [0.0, 5.0], "songs": [4, 1], "bits_per_code": {name: [1.0, float("nan")] for name in CONDITIONS}
        },
    },
    "alignment": {
        "songs": 3, "songs_cut": 1, "songs_without_times": 0, "heads": ((0, 1),), "blank": 0.4, "attention": ERRORS,
        "chosen_on": {"songs": 1, "data": "a fifth", "errors": ERRORS | {"within_100_ms": 0.5, "within_300_ms": 0.5}},
        "evenly_spread_words": ERRORS,
    },
    "generation": {
        "songs": 4, "failed": 1, "longer_than_the_window": 2, "solfege": True,
        "reference": {"data": "the true ones", "songs": 4},
        "generated": SOUND | {"attention_against_note_starts": None},
        "ceiling": SOUND | {"ended_by_themselves": None}, "each_song": [],
    },
}  # fmt: skip


def test_all_of_it_is_written_and_printed(tmp_path):
    says = io.StringIO()
    write_report(tmp_path / "out", FIGURES, Console(file=says, width=60))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json", "evaluation.md", "gains.png", "genres.png", "over_time.png",
    ]  # fmt: skip
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["likelihood"]["gain_per_sung_word"]["lyrics_against_none"] == {
        "value": 0.25, "low": 0.125, "high": 0.5, "songs": 4,
    }  # fmt: skip
    assert told["likelihood"]["over_time"]["bits_per_code"]["right"] == [1.0, None]
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for part in ("# run, step 7", "**Warning**: held_out was trained on.", "1 songs are cut, 5 frames lie outside"):
        assert part in text
    for part in ("| lyrics against none | 0.250 [0.125, 0.500] | 0.250 | 0.250 | 0.250 [0.125, 0.500] |",):
        assert part in text
    assert "| notes right | 25.0% [12.5%, 50.0%] | 25.0% [12.5%, 50.0%] |" in text
    assert "| ended by themselves | 25.0% [12.5%, 50.0%] | - |" in text and "right number" not in text
    assert "layer 0 head 1, blank 0.4, chosen on a fifth" in text and "![genres.png](genres.png)" in text
    assert "1 songs are longer than the window: words" in text and "2 true songs are longer than the window" in text
    assert "Sampling: temperature 0.7. Fréchet distance: 40 bands." in text and "temperature 0.7" in says.getvalue()
    assert "word error rate" not in text and "1 more could not be sung" in text
    assert "right number" not in says.getvalue() and "0.250 [0.125, 0.500]" in says.getvalue()  # not cut at 60


def test_a_part_that_was_left_out_is_no_table(tmp_path):
    figures = {name: value for name, value in FIGURES.items() if name not in ("likelihood", "generation")}
    assert len(tabulate(figures)) == 1
    figures["alignment"] = {"note": "none: songs with word times are needed"}
    assert tabulate(figures)[0].rows == [["none: songs with word times are needed"]]
    write_report(tmp_path, figures, Console(file=io.StringIO()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_parts_that_are_not_evaluated_anew_stay_where_they_hold(tmp_path):
    def again(**other):
        write_report(tmp_path / "out", other, Console(file=io.StringIO()))
        return json.loads((tmp_path / "out" / "evaluation.json").read_text())

    of = {name: value for name, value in FIGURES.items() if name not in ("likelihood", "alignment", "generation")}
    unknown = FIGURES["alignment"] | {"attention": ERRORS | {"words": 0, "median_ms": float("nan")}}
    whole = again(**FIGURES | {"alignment": unknown})
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert again(**of, likelihood=FIGURES["likelihood"]) == whole
    assert (tmp_path / "out" / "evaluation.md").read_text() == text and "| 0 | - | 60 |" in text
    sung_otherwise = of | {"settings": of["settings"] | {"seed": 1}}
    assert {"likelihood", "alignment"} <= set(found := again(**sung_otherwise)) and "generation" not in found
    assert not {"likelihood", "alignment", "generation"} & set(again(**of | {"songs_fingerprint": "3f"}))


def test_values_are_json():
    assert plain({"a": (1, float("inf"), None, "b", True), "e": SOME}) == {
        "a": [1, None, None, "b", True],
        "e": {"value": 0.25, "low": 0.125, "high": 0.5, "songs": 4},
    }


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out"):
        write_report(tmp_path / "out", FIGURES, Console(file=io.StringIO()))
