"""Which hidden layer of the text encoder still tells words and their order apart? A linear probe of each.

    python scripts/probe_layers.py SONGS [--text-encoder minilm] [--splits 5]

From the state of each word's first piece, ridge regression guesses the word itself, the word before, the word after,
and the place in the line. Lines of the same words are all on one side of the split, so that nothing is known by heart;
the strength of the ridge is chosen on lines of the training side. Prints the share that is right on unseen lines (mean
over the splits), and what always guessing the commonest answer scores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from jaxtyping import Float, Int

from l2m_jax.cli import answering
from l2m_jax.lyrics import TextEncoder, encode_text, parse_lyrics
from l2m_jax.songs import scan_songs
from l2m_jax.weights import load_text_encoder

TASKS = ("word", "word before", "word after", "place in line")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean square of the states
LEAST = 5  # a word that stands in fewer places is asked for by none


class Words(NamedTuple):
    """Every word of all songs."""

    states: Float[np.ndarray, "L n E"]
    answers: dict[str, Int[np.ndarray, " n"]]
    """Class of each word in each task; -1 where there is no question."""
    line: Int[np.ndarray, " n"]
    """Number of the line's text: equal lines have one number."""


def read_words(folder: Path, encoder: TextEncoder, layers: int) -> Words:
    """Words of all songs of the folder, with their states after 0 to `layers` layers."""
    states, words, before, after, place, line = [], [], [], [], [], []
    for song in scan_songs(folder)[0]:
        lyrics = parse_lyrics(song.lyrics)
        of_layers = [encode_text(dataclasses.replace(encoder, layer=i), lyrics) for i in range(layers + 1)]
        firsts = [int(np.flatnonzero(of_layers[0].word == i)[0]) for i in range(len(lyrics.words))]
        states.append(np.stack([encoded.states[firsts] for encoded in of_layers]))
        numbers, starts = np.unique(lyrics.lines, return_index=True)
        text = {int(n): " ".join(np.array(lyrics.words)[np.array(lyrics.lines) == n]) for n in numbers}
        words += lyrics.words
        before += ["", *lyrics.words[:-1]]
        after += [*lyrics.words[1:], ""]
        place += [i - int(starts[numbers == n][0]) for i, n in enumerate(lyrics.lines)]
        line += [text[n] for n in lyrics.lines]
    known, counts = np.unique(words, return_counts=True)
    classes = {str(word): i for i, word in enumerate(known[counts >= LEAST])}
    answers = {
        task: np.array([classes.get(word, -1) for word in column])
        for task, column in zip(TASKS, (words, before, after))
    }
    answers["place in line"] = np.minimum(place, 7)
    return Words(np.concatenate(states, axis=1), answers, np.unique(line, return_inverse=True)[1])


def fit(states: Float[np.ndarray, "n E"], answers: Int[np.ndarray, " n"], ridge: float) -> Float[np.ndarray, "E c"]:
    """Weights from states to scores of the classes, in closed form."""
    wanted = np.eye(answers.max() + 1)[answers]
    gram = states.T @ states
    return np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), states.T @ wanted)


def score(states: np.ndarray, answers: np.ndarray, train: np.ndarray, test: np.ndarray, ridge: float) -> float:
    """Share of `test` that is right after fitting `train`; both are masks."""
    mean = states[train].mean(axis=0)
    spread = states[train].std(axis=0) + 1e-6
    design = np.c_[(states - mean) / spread, np.ones(len(states))]
    guessed = (design[test] @ fit(design[train], answers[train], ridge)).argmax(axis=1)
    return float(np.mean(guessed == answers[test]))


def probe(words: Words, task: str, layer: int, seed: int) -> tuple[float, float]:
    """Share of unseen lines' questions that is right, and the share of the commonest answer."""
    answers, asked = words.answers[task], words.answers[task] >= 0
    part = np.random.default_rng(seed).integers(0, 4, words.line.max() + 1)[words.line]  # 0: test, 1: choice of ridge
    states, test = words.states[layer].astype(np.float64), asked & (part == 0)
    fitting, choosing = asked & (part > 1), asked & (part == 1)
    ridge = max(RIDGES, key=lambda r: score(states, answers, fitting, choosing, r))
    commonest = np.bincount(answers[fitting | choosing]).argmax()
    return score(states, answers, fitting | choosing, test, ridge), float(np.mean(answers[test] == commonest))


@dataclasses.dataclass(frozen=True)
class Job:
    """How well does each layer of a text encoder tell words and their order apart?"""

    songs: tyro.conf.Positional[Path]
    """Folder of songs."""
    text_encoder: str = "minilm"
    splits: int = 5
    """Random splits into known and unseen lines."""


def main(job: Job) -> None:
    """Prints the table."""
    encoder = load_text_encoder(job.text_encoder, -1)
    words = read_words(job.songs, encoder, encoder.layer)
    print(f"{words.states.shape[1]} words, {words.line.max() + 1} different lines, {job.splits} splits")
    print("layer   " + "".join(f"{task:>15}" for task in TASKS) + "           mean")
    chance = []
    for layer in range(len(words.states)):
        found = np.array([[probe(words, task, layer, seed) for task in TASKS] for seed in range(job.splits)])
        right, chance = found.mean(axis=0).T
        print(f"{layer:<8}" + "".join(f"{share:15.1%}" for share in (*right, right.mean())), flush=True)
    print("commonest" + "".join(f"{share:15.1%}" for share in (*chance, np.mean(chance)))[1:])


if __name__ == "__main__":
    with answering("probe_layers"):
        main(tyro.cli(Job))
