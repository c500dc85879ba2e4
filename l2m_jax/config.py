"""Typed configuration: what a run is, as frozen dataclasses. First in the flow; imports nothing of the package.

Letters, the same everywhere: B batch, T positions, F frames, K codebooks, V entries per codebook, S memory length,
E text width, D model width, N heads, H head width, L layers, C cache length, J id streams per position, W id space.

This module imports no JAX, so that the command line answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal

C = typing.TypeVar("C")


TEXT_LAYER = 2
"""Hidden layer of the text encoder whose states are the memory, by default; scripts/probe_layers.py says why."""


class UserError(Exception):
    """A mistake that the user can mend: the command line prints its one line, without a traceback."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the SoundTransformer."""

    layout: Literal["flatten", "delay"] = "flatten"
    """flatten: one code a position, K positions a frame. delay: one frame a position, codebook k shifted by k."""
    codebooks: int = 2
    """K, codebooks a frame: 2 is 1.5 kbit/s at 75 frames/s."""
    entries: int = 1024
    """V, entries of each codebook."""
    frames: int = 9000
    """F, frames in the window: 9,000 is 120 s at 75 frames/s, 18,000 codes with two codebooks."""
    memory: int = 512
    """S, cap on genre plus lyric pieces of one song."""
    text_width: int = 384
    """E, width of the text encoder's states."""
    width: int = 512
    """D, model width."""
    heads: int = 4
    """N, attention heads."""
    attention_width: int = 0
    """Width of a position's queries, all heads together: each is so much / N wide. 0 is D. The narrower, the faster
    are long songs and the smaller is the cache of generation (apart from D as in T5: Raffel et al., 2020)."""
    key_heads: int = 0
    """Heads of keys and values, each shared by as many query heads; 0 is one a query head. The fewer, the smaller the
    cache of generation and the faster it is (grouped queries: Ainslie et al., 2023)."""
    layers: int = 4
    """L, layers."""
    norm: Literal["post", "deepnorm", "pre"] = "post"
    """post: x = LN(x + f(x)) (Vaswani et al., 2017). deepnorm: a = (3 L)^(1/4), for depth (Wang et al., 2022).
    pre: x + f(LN(x)) and an LN after the last layer (Xiong et al., 2020)."""
    rotary: bool = False
    """RoPE (Su et al., 2021) beside the learned position embeddings: queries and keys of self-attention are turned by
    their positions, so that their products tell how far apart they stand."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. auto: float32 on CPU, bfloat16 on accelerators."""

    def __post_init__(self) -> None:
        for name in ("codebooks", "entries", "frames", "memory", "text_width", "width", "heads", "layers"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.attention_width < 0:
            raise UserError(f"model.attention_width is {self.attention_width}; allowed: 0 (model.width) and above")
        if self.query_width % self.heads:
            what = "attention_width" if self.attention_width else "width"
            raise UserError(f"model.{what} {self.query_width} must be a multiple of model.heads {self.heads}")
        if self.key_heads < 0 or (self.key_heads and self.heads % self.key_heads):
            raise UserError(
                f"model.key_heads is {self.key_heads}; allowed: 0, or what divides model.heads {self.heads}"
            )
        if self.rotary and self.head_width % 2:
            raise UserError(f"model.rotary turns pairs: heads of {self.head_width} must be of an even width")
        if self.codebooks > 32:
            raise UserError(f"model.codebooks is {self.codebooks}; EnCodec has at most 32")

    @property
    def query_width(self) -> int:
        """Width of the queries of a position: heads times H."""
        return self.attention_width or self.width

    @property
    def head_width(self) -> int:
        """H."""
        return self.query_width // self.heads

    @property
    def key_width(self) -> int:
        """Width of the keys of a position, and of its values: key heads times H."""
        return (self.key_heads or self.heads) * self.head_width

    @property
    def residual_scale(self) -> float:
        """a of x = LN(a x + f(x)); three sublayers a layer."""
        return (3 * self.layers) ** 0.25 if self.norm == "deepnorm" else 1.0

    @property
    def initial_gain(self) -> float:
        """Gain on the initial value, output and MLP weights."""
        return (12 * self.layers) ** -0.25 if self.norm == "deepnorm" else 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices. -1 takes all that are left."""

    data: int = -1
    """Copies of the model, each with its own songs."""
    fsdp: int = 1
    """Parameters and optimizer state split, gathered layer by layer; also splits the songs."""
    tensor: int = 1
    """Heads and MLP columns split."""
    context: int = 1
    """Positions of one song split; keys and values are gathered."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the model is trained."""

    seed: int = 0
    """Initial weights, order of songs, condition dropout."""
    init: str = ""
    """Run or exported model to begin with (fine-tuning), or solfege, which comes with the package; its layers have the
    same shape. Nothing: random weights."""
    batch: int = 8
    """Songs a step, over all devices."""
    windows: int = 1
    """Where songs are of many lengths: so many windows, each an equal part longer than the one before, the last
    model.frames. Songs of like length stand together in a batch, in the smallest window that holds them."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are averaged. Divides batch."""
    steps: int = 10_000
    """Optimizer steps."""
    lr_max: float = 3e-4
    """Peak of the learning rate, reached after warm-up."""
    lr_min: float = 3e-5
    """Learning rate of the last step; cosine in between."""
    warmup: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    guide: float = 0.0
    """Where songs have word times (words.csv): what it counts for, beside a code, that the first head of the middle
    layer looks at the word that is being sung (one look a position, which in `delay` says K codes). From that the place
    in the lyrics is learnt sooner than from sound."""
    dropout: tuple[float, float, float] = (0.07, 0.06, 0.07)
    """Condition dropout, one draw a song: share of songs without lyrics, without genre, without both."""
    remat: Literal["none", "attention", "layer"] = "attention"
    """What the backward pass computes anew. layer: each layer, from its input; attention: the same, but the results of
    attention are kept, most of the work of long songs (not those of cuDNN, on GPUs); none: nothing, fastest where
    memory is plenty."""
    chunk: int = 1024
    """Positions of each `context` shard whose logits are in memory at a time."""
    log_every: int = 10
    """Steps between lines of the terminal and of TensorBoard; metrics.jsonl has every step."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    valid_every: int = 200
    """Steps between losses on --valid songs, and looks at how far the attention follows the words (diagonality)."""
    sample_every: int = 0
    """Steps between sample songs (the first song's prompt) in TensorBoard and RUN/samples; 0 for none."""
    sample_seconds: float = 10.0
    """Length of a sample song."""

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "windows",
            "accumulate",
            "steps",
            "log_every",
            "checkpoint_every",
            "keep",
            "chunk",
            "valid_every",
        ):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("warmup", "sample_every", "weight_decay", "lr_min", "guide"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        check_seed("train.seed", self.seed)
        if self.batch % self.accumulate:
            raise UserError(f"train.accumulate {self.accumulate} must divide train.batch {self.batch}")
        if not 0 < self.lr_max < math.inf or self.lr_min > self.lr_max:
            raise UserError(f"train.lr_max {self.lr_max} must be above 0 and not below train.lr_min {self.lr_min}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; allowed: 0 and above, below 1")
        if not 0 < self.sample_seconds < math.inf:
            raise UserError(f"train.sample_seconds is {self.sample_seconds}; allowed: above 0")
        if not self.clip > 0:
            raise UserError(f"train.clip is {self.clip}; allowed: above 0")
        if not (min(self.dropout) >= 0 and sum(self.dropout) <= 1):
            raise UserError(f"train.dropout {self.dropout} must be shares that sum to at most 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: the model, its training and its mesh."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How the next code is drawn; temperature and guidance by default as solfege songs were sung best."""

    temperature: float = 0.7
    """Divides the logits: below 1 surer and plainer, above 1 wilder; 0 takes the likeliest code."""
    top_k: int = 250
    """Draw among the k likeliest codes; 0 among all. Cuts off the unlikely, however many are likely."""
    top_p: float = 1.0
    """Draw among the likeliest codes that together hold this probability: few where the model is sure."""
    min_p: float = 0.0
    """Draw among the codes at least this share as likely as the likeliest; 0 among all."""
    repetition_penalty: float = 1.0
    """Divides the probability of each code that was said in the repetition window: above 1 against stuck notes."""
    repetition_window: int = 75
    """Frames that repetition-penalty looks back."""
    guidance_lyrics: float = 2.0
    """g_lyrics: how hard the words are followed; 1 is the model's own distribution, else it costs two songs."""
    guidance_genre: float = 1.0
    """g_genre: how hard the genre is followed; 1 is the model's own distribution."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; allowed: 0 (greedy) and above")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}; allowed: 0 (all codes) and above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}; allowed: above 0, up to 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p is {self.min_p}; allowed: 0 (all codes) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition-penalty is {self.repetition_penalty}; allowed: above 0; 1 changes nothing")
        if self.repetition_window < 1:
            raise UserError(f"repetition-window is {self.repetition_window} frames; allowed: 1 and above")
        for name in ("guidance_lyrics", "guidance_genre"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; a finite number is needed")


Part = Literal["likelihood", "alignment", "generation"]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated, and how."""

    only: tuple[Part, ...] = ("likelihood", "alignment", "generation")
    """Parts to do: bits per code and gains; word starts from attention; songs that are sung and heard."""
    songs: int = 64
    """Held-out lyrics that are sung, evenly spread over the dataset."""
    seed: int = 0
    """Of the first song; the next one has seed + 1."""
    batch: int = 8
    """Songs that are computed at the same time; fewer take less memory."""
    pictures: int = 3
    """Songs that are drawn."""
    sampling: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if not self.only:
            raise UserError(f"only names no part; possible are {', '.join(typing.get_args(Part))}")
        for name, least in (("songs", 1), ("batch", 1), ("pictures", 0)):
            _at_least(name, getattr(self, name), least)
        check_seed("seed", self.seed)
        check_seed("the seed of the last song", self.seed + self.songs - 1)


def check_seed(name: str, seed: int) -> None:
    """UserError where the seed is not one of JAX's: others would overflow, or be taken for one of these."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} is {seed}; allowed: 0 to {2**32 - 1}")


def to_json(config: Any) -> dict[str, Any]:
    """A config as JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[C], values: Any, where: str) -> C:
    """The config that `to_json` wrote. A key or a type that does not belong raises UserError naming it and `where`."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}; needed: the fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(hints)}")
        hint = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = from_json(hint, value, f"{where}: {key}")
        elif not _fits(value, hint):
            raise UserError(f"{where}: {key} is {value!r}; needed: {hint.__name__ if isinstance(hint, type) else hint}")
        given[key] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(hint, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint or (hint is types.NoneType and value is None)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{name} is {value}; allowed: {least} and above")
