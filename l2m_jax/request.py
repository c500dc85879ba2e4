"""What a song is asked for, and files of many such requests. After `config`; imports no JAX."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from l2m_jax.config import SampleConfig, UserError, check_seed, from_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(SampleConfig):
    """What one song is asked for: its words, its limits, and how its codes are drawn."""

    lyrics: str = ""
    """The lyrics. On the command line and in a file of requests: they themselves, or the name of a UTF-8 text file."""
    genre: str = ""
    """The genre, in words; empty lets the model choose."""
    seed: int = 0
    """The same seed gives the same song, among batches of one padded size."""
    seconds: float | None = None
    """Longest that the song may get, prompt included; the model's window by default. It ends earlier by itself."""
    min_seconds: float = 0.0
    """Shortest that the song may get."""
    prompt: str | None = None
    """A song to go on from: sound (mp3, flac, ogg, wav), or codes (song.ecdc, song.npz), which are kept as they are."""
    from_seconds: Annotated[float | None, tyro.conf.arg(name="from")] = None
    """Keep the prompt up to this second and sing on from there; by default all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)
        for name in ("seconds", "from_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name.split('_')[0]} is {value:g}; allowed: above 0")
        if not 0 <= self.min_seconds < math.inf:
            raise UserError(f"min-seconds is {self.min_seconds:g}; allowed: 0 and above")
        if self.seconds is not None and self.min_seconds > self.seconds:
            raise UserError(f"min-seconds {self.min_seconds:g} is more than seconds {self.seconds:g}")
        if self.from_seconds is not None and self.prompt is None:
            raise UserError(f"from {self.from_seconds:g} needs a prompt: the song whose first seconds are kept")

    @property
    def rule(self) -> SampleConfig:
        """How its codes are drawn: songs of one rule are sung together."""
        return SampleConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SampleConfig)})


class Line(NamedTuple):
    """A line of a file of requests."""

    number: int
    name: str  # the song's id; `line-NUMBER` where it has no usable one
    request: Request | UserError  # or what is wrong with it


def pack(requests: Sequence[Request], batch: int) -> list[list[int]]:
    """Indices of the requests, at most `batch` together: of one rule, all or none with a prompt, of like limits."""

    def kind(i: int) -> tuple[Any, ...]:
        return dataclasses.astuple(requests[i].rule), requests[i].prompt is not None

    order = sorted(range(len(requests)), key=lambda i: (*kind(i), requests[i].seconds or math.inf))
    groups = [list(group) for _, group in itertools.groupby(order, key=kind)]
    return [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]


def read_requests(path: Path, defaults: Request) -> list[Line]:
    """The requests of a JSONL file; what a line does not say is as in `defaults`. UserError where it cannot be read."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    found: list[Line] = []
    names: dict[str, int] = {}  # file systems may take Song and song for one name
    for number, content in enumerate(lines, 1):
        if not content.strip():
            continue
        name = f"line-{number}"
        try:
            values = _parse(content)
            said = _checked_id(values.pop("id", None))
            if said.casefold() in names:
                raise UserError(f"id {said!r} is that of line {names[said.casefold()]} already; give each song its own")
            if "from" in values:  # as the command line has it
                values["from_seconds"] = values.pop("from")
            name = said
            names[said.casefold()] = number
            request = from_json(Request, dataclasses.asdict(defaults) | values, "request")
            request = dataclasses.replace(request, lyrics=read_text(request.lyrics))
            found.append(Line(number, name, request))
        except UserError as error:
            found.append(Line(number, name, error))
    if not found:
        raise UserError(f"{path}: holds no requests; write one JSON object a line, with id, lyrics and genre")
    return found


def read_text(lyrics: str) -> str:
    """The file's text where `lyrics` names a file, else `lyrics` itself."""
    path = Path(lyrics)
    try:
        named = path.is_file()
    except (OSError, ValueError):  # too long for a file name, or not readable as one: it is the text
        named = False
    if not named:
        if path.suffix == ".txt" and "\n" not in lyrics:
            raise UserError(f"{lyrics}: no such file")
        return lyrics
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8"), parse_int=lambda n: int(n) if len(n) < 20 else float(n))
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error}); write one object a line") from None
    if not isinstance(values, dict):
        raise UserError("is not a JSON object with id, lyrics and genre")
    return values


def _checked_id(name: Any) -> str:
    """UserError where files cannot be named so."""
    if not isinstance(name, str) or not name:
        raise UserError(f"id is {name!r}; a text is needed: the song's files are named by it")
    plain = name.isprintable() and not set(name) & set('/\\:*?"<>|') and name[0] not in ".-" and name == name.strip()
    if not plain or len(name.encode()) > 200 or name.casefold().endswith(".error"):
        raise UserError(f"id {name[:80]!r} is no plain file name; use letters, digits, '-', '_', up to 200 bytes")
    return name
