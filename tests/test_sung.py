"""Songs against their solfege lyrics."""

import numpy as np
import pytest

from l2m_jax.solfege import sing
from l2m_jax.sung import is_solfege, listen, score


@pytest.mark.parametrize(
    "lyrics, expected",
    [("do re\n[chorus]\nmi", True), ("do la luna", False), ("[instrumental]", False), ("", False)],
)
def test_solfege_is_known_by_its_syllables(lyrics, expected):
    assert is_solfege(lyrics) == expected


def test_notes_are_scored():
    samples, _ = sing("do re mi fa", "march", np.random.default_rng(0))
    heard = [listen(samples, 24_000, lyrics) for lyrics in ("[verse]\ndo re\nmi fa", "do re mi sol", "do re mi")]
    assert heard[0].names == ["do", "re", "mi", "fa"] == heard[0].asked
    found = score(heard)
    assert found["note_accuracy"].value == pytest.approx((4 + 3 + 2) / (4 + 4 + 3))  # of all notes
    assert found["right_number_of_notes"].value == pytest.approx(2 / 3)
    assert found["songs_without_a_mistake"].value == pytest.approx(1 / 3)
    assert found["songs"] == 3 and found["note_accuracy"].low < found["note_accuracy"].value
