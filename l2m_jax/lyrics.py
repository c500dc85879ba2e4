"""Text as the transformer sees it: lyrics and genre become states of a frozen BERT. After `bert`, before `weights`.

    "[Chorus]\\nla luna"  -> Lyrics       words la, luna; section chorus
                          -> Pieces       la, lu, ##na                       rows P of the memory
                          -> EncodedText  states [P, E] from windows of at most 512 positions

Every word of the lyrics has at least one row, and so has every section tag without words. Section tags are structure:
BERT never reads them. Letters: P rows, G genre pieces, E text width, T positions of BERT.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from l2m_jax.bert import Bert
from l2m_jax.config import UserError

SECTIONS = ("none", "verse", "chorus", "bridge", "intro", "outro", "instrumental", "other")

_TAG = re.compile(r"\s*\[([^\[\]]*)\]\s*")
# What else writers call a section; the mapping of Wang, Hung and Smith ("To catch a chorus", ICASSP 2022).
_SYNONYMS = {
    "verse": "prechorus rap strophe",
    "chorus": "postchorus hook refrain",
    "bridge": "transition",
    "intro": "introduction opening",
    "outro": "coda end ending",
    "instrumental": "inst interlude solo break breakdown drop",
}
_SECTION_OF = {name: i for i, name in enumerate(SECTIONS)} | {
    word: SECTIONS.index(name) for name, words in _SYNONYMS.items() for word in words.split()
}
UNKNOWN = 0.03
"""Share of unknown pieces beyond which the text encoder is the wrong one for the lyrics."""
_BUCKETS = (64, 128, 256)  # Lengths that BERT is compiled for, beside its longest.


@dataclasses.dataclass(frozen=True)
class Lyrics:
    """Parsed lyrics. The first three are in step: an item a word, in order of the text."""

    words: tuple[str, ...]
    lines: tuple[int, ...]
    """Line that each word stands on; the first line of the text is 0."""
    sections: tuple[int, ...]
    """Section of each word, an index into SECTIONS."""
    empty_tags: tuple[tuple[int, int], ...] = ()
    """Tags that govern no words: (words that come before it, section)."""
    warnings: tuple[str, ...] = ()
    """A line for each tag that is not known, with its line number counted from 1."""


class Pieces(NamedTuple):
    """Rows that lyrics take in the memory."""

    ids: Int[np.ndarray, " P"]
    """WordPiece id; -1 where there is nothing to read: an empty tag, or a word of control characters only."""
    word: Int[np.ndarray, " P"]
    """Index of the word; -1 for an empty tag."""
    section: Int[np.ndarray, " P"]
    """Index into SECTIONS."""


class EncodedText(NamedTuple):
    """Lyrics as memory rows, in order of the text."""

    states: Float[np.ndarray, "P E"]
    """States of BERT; zero where `Pieces.ids` is -1."""
    word: Int[np.ndarray, " P"]
    section: Int[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder; `weights.load_text_encoder` makes one."""

    name: str
    fingerprint: str
    """Of weights, tokenizer and layer: texts encoded by encoders that differ must not be mixed."""
    width: int
    """E."""
    positions: int
    """Largest T, with [CLS] and [SEP]."""
    layer: int
    """Layers that are run; 0 gives the embeddings."""
    tokenizer: Tokenizer
    module: Bert | Callable[..., np.ndarray]
    """Ids [1, T], mask [1, T] and layer to states [1, T, E]: a Bert, which is compiled, or one of `originals`."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer.json, or vocab.txt with tokenizer_config.json; UserError where neither can be read."""
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = _wordpiece(folder)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        raise UserError(f"{folder}: holds no tokenizer.json or vocab.txt that can be read ({error})") from error
    return plain_tokenizer(tokenizer, str(folder))


def plain_tokenizer(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """Whatever its file says, it neither cuts nor pads, and takes a "[SEP]" in the lyrics for text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{where}: its tokenizer does not put [CLS] and [SEP] around a text; give that of an encoder")
    return tokenizer


def parse_lyrics(text: str, where: str = "lyrics") -> Lyrics:
    """Words and sections of `text`; `where` names it in messages.

    A line that is only `[tag]` sets the section of the words that follow, until the next tag; what no tag governs is in
    section "none". Words are what white space divides, after NFC normalisation. Raises UserError where there are
    neither words nor tags.
    """
    if not _is_unicode(text):
        raise UserError(f"{where}: not UTF-8; type them in a UTF-8 terminal")
    words, lines, sections, empty_tags, warnings = [], [], [], [], []
    open_tag = None  # (words before it, section) of the latest tag, as long as no word follows.
    section = 0
    for number, line in enumerate(unicodedata.normalize("NFC", text.removeprefix("\ufeff")).splitlines()):
        if tag := _TAG.fullmatch(line):
            if open_tag:
                empty_tags.append(open_tag)
            section, known = _section(tag[1])
            if not known:
                warnings.append(f"{where}, line {number + 1}: section tag [{tag[1]}] is not known, taken as [other]")
            open_tag = (len(words), section)
        elif found := line.split():
            words += found
            lines += [number] * len(found)
            sections += [section] * len(found)
            open_tag = None
    if open_tag:
        empty_tags.append(open_tag)
    if not words and not empty_tags:
        raise UserError(f"{where}: no words; write the lyrics there, or [instrumental] for a song without any")
    return Lyrics(tuple(words), tuple(lines), tuple(sections), tuple(empty_tags), tuple(warnings))


def normalise_genre(genre: str) -> str:
    """Genre in one spelling: NFC, case folded, white space trimmed and collapsed. UserError where it is not Unicode."""
    if not _is_unicode(genre):
        raise UserError(f"genre {genre!r} is not UTF-8; type it in a UTF-8 terminal")
    return " ".join(unicodedata.normalize("NFC", genre).casefold().split())


def split_pieces(encoder: TextEncoder, lyrics: Lyrics) -> Pieces:
    """Rows of the lyrics: the pieces of every word in order, empty tags in between."""
    encoding = encoder.tokenizer.encode(" ".join(lyrics.words), add_special_tokens=False)
    # A piece is of the word in which it starts; the space before a word is part of it, as in XLM-R's "▁luna".
    ends = np.cumsum([len(word) + 1 for word in lyrics.words]) - 1
    word = np.searchsorted(ends, [start for start, _ in encoding.offsets], side="right").astype(np.int32)
    mute = np.setdiff1d(np.arange(len(lyrics.words), dtype=np.int32), word)  # Words that the tokenizer drops.
    before, tag_section = np.array(lyrics.empty_tags, np.int32).reshape(-1, 2).T
    # A tag with `before` words before it stands between words before - 1 and before: a stable sort puts it there.
    order = np.argsort(np.concatenate([before - 0.5, word, mute]), kind="stable")
    ids = np.concatenate([np.full_like(before, -1), np.array(encoding.ids, np.int32), np.full_like(mute, -1)])
    word = np.concatenate([np.full_like(before, -1), word, mute])
    section = np.concatenate([tag_section, np.array(lyrics.sections, np.int32)[word[len(before) :]]])
    return Pieces(ids[order], word[order], section[order])


def unknown_warning(encoder: TextEncoder, pieces: Pieces, where: str) -> tuple[str, ...]:
    """A line where more than UNKNOWN of the pieces are none that the encoder knows: they all look the same to it."""
    names = [encoder.tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>")]
    share = np.mean(np.isin(pieces.ids, [i for i in names if i is not None]))
    if share <= UNKNOWN:
        return ()
    return (
        f"{where}: {share:.0%} of the pieces are unknown to the text encoder {encoder.name}, all one to the model;"
        " prepare the songs with one that knows the script: --text-encoder bert-base-multilingual-cased",
    )


def check_memory(pieces: int, genre_pieces: int, cap: int, where: str) -> None:
    """Raise UserError where lyrics of `pieces` rows and a genre of `genre_pieces` do not fit a memory of `cap` rows."""
    if (excess := pieces + genre_pieces - cap) > 0:
        raise UserError(
            f"{where}: {pieces} lyric pieces and {genre_pieces} genre pieces are {excess} more than the {cap} that the"
            f" memory holds; raise model.memory to {pieces + genre_pieces}, or shorten the lyrics"
        )


def encode_text(encoder: TextEncoder, lyrics: Lyrics) -> EncodedText:
    """States of all the lyrics, however long: a window at a time, so that memory stays bounded."""
    pieces = split_pieces(encoder, lyrics)
    states = np.zeros((len(pieces.ids), encoder.width), np.float32)
    states[pieces.ids >= 0] = _encode_ids(encoder, pieces.ids[pieces.ids >= 0])
    return EncodedText(states, pieces.word, pieces.section)


def encode_genre(encoder: TextEncoder, genre: str) -> Float[np.ndarray, "G E"]:
    """States of the genre, which is free text; none, [0, E], for an empty one."""
    encoding = encoder.tokenizer.encode(normalise_genre(genre), add_special_tokens=False)
    return _encode_ids(encoder, np.array(encoding.ids, np.int32))


def _is_unicode(text: str) -> bool:
    """Whether there are no lone surrogates, which stand for what a terminal could not decode."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _wordpiece(folder: Path) -> Tokenizer:
    """BERT's own tokenizer, for checkpoints older than tokenizer.json."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    vocab = WordPiece.read_file(str(folder / "vocab.txt"))
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer


def _section(tag: str) -> tuple[int, bool]:
    """Section that a tag names, by its first known word, and whether there is one: "Chorus 2: Ana" is a chorus."""
    title = re.sub(r"\b(pre|post)[\s-]+", r"\1", tag.partition(":")[0].casefold())
    found = [_SECTION_OF[word] for word in re.findall(r"[^\W\d_]+", title) if word in _SECTION_OF]
    return (found[0], True) if found else (SECTIONS.index("other"), False)


def windows(pieces: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Windows over `pieces`: (start, first kept, first not kept).

    Windows of `size` start every size // 2, the last one where it ends with the text. A piece is kept from the window
    in which it stands farthest from an edge, that is, whose centre is nearest; the earlier one of equals.
    """
    starts = [*range(0, pieces - size, size // 2), max(pieces - size, 0)]
    cuts = [0, *((a + b + size + 1) // 2 for a, b in itertools.pairwise(starts)), pieces]
    return zip(starts, cuts, cuts[1:])


def _encode_ids(encoder: TextEncoder, ids: Int[np.ndarray, " P"]) -> Float[np.ndarray, "P E"]:
    """States of pieces, [CLS] and [SEP] put around each window and taken off again."""
    states = np.zeros((len(ids), encoder.width), np.float32)
    if not len(ids):
        return states
    cls, sep = encoder.tokenizer.encode("").ids
    body = encoder.positions - 2
    for start, first, end in windows(len(ids), body):
        window = np.array([cls, *ids[start : start + body], sep], np.int32)
        length = min(n for n in (*_BUCKETS, encoder.positions) if len(window) <= n <= encoder.positions)
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(window)] = window
        run = functools.partial(_run, encoder.module) if isinstance(encoder.module, Bert) else encoder.module
        output = run(padded, np.arange(length)[None] < len(window), encoder.layer)
        states[first:end] = np.asarray(output)[0, 1 + first - start : 1 + end - start]
    return states


@functools.partial(jax.jit, static_argnames="layer")
def _run(module: Bert, ids: Int[Array, "1 T"], mask: Bool[Array, "1 T"], layer: int) -> Float[Array, "1 T E"]:
    with jax.default_matmul_precision("float32"):  # Accelerators would round; states are prepared once, for all.
        return module(ids, mask, layer)
