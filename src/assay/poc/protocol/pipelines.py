"""Every way of turning a model's work into a proof, as one table.

A :class:`Pipeline` is data: which positions are read, what happens between layers, on the last
hidden state, in the head and on the logits, and what is published. The steps themselves are in
:mod:`assay.poc.protocol.transforms`. Adding an approach adds a row.

The rows carry the names under which the published experiments report them. ``poc-2.0`` is their
recommendation (there: "sign flips"); ``artifact`` is what the network runs today; ``tokens-1`` is
what a new network should take (docs/protocol.md); ``hardened`` is the proposal of docs/redteam.md;
``decode`` is that of docs/decode.md, where ``chain-decode`` stands as well, the decode proof of the
live network. The nonces of these two take more than one forward pass.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from assay.errors import UsageError
from assay.stats.chord import RANDOM_HEAD_ROWS

if TYPE_CHECKING:
    from assay.models.frame import Frame

LayerStep = Literal[
    "none", "signs", "normalize_reflect", "reflect"
]  # what happens between the layers of a decoder

SKETCH_EVERY = 32  # tokens from one sketch to the next; the first token has one

SKETCH_SIZE = (
    12  # numbers of a sketch: 24 bytes in float16, three quarters of a byte for every token
)

SPHERE_SIZE = 256  # coordinates of a state that the chain's decode proof reads in a step
SPHERE_POINTS = 16  # points of which the nearest one is published

_FEWEST_SCALED = 8  # positions

_FEWEST_STEPS = SKETCH_EVERY
_MOST_STEPS = 4096
_MANY_STEPS = 256  # the law of these holds for more of them, and is too narrow for fewer
_ALIASES = {
    "sign-flips": "poc-2.0",
    "decode-256": "decode",
    "chain-decode-256": "chain-decode",
}
_STEPS = re.compile("(decode|chain-decode)-([1-9][0-9]{0,3})")


def sketch_steps(tokens: int) -> range:
    """Return the indices of the tokens whose states are sketched, of so many tokens.

    Example:
        >>> list(sketch_steps(80))
        [0, 32, 64]
    """
    return range(0, tokens, SKETCH_EVERY)


@dataclass(frozen=True)
class Step:
    """One step on a vector; ``count`` is its number of reflections, coordinates or projections."""

    name: Literal["signs", "unit", "reflect", "permute", "pick", "rotate", "project"]
    count: int = 0


@dataclass(frozen=True)
class Positions:
    """Which positions are read: the second half, or with ``scaled`` all after the first eighth.

    The result is the sum of their unit states, each with a sign that is drawn for the nonce. States
    of the first positions are far from all others, and most of their noise is their own. With
    ``scaled``, what is left out is an eighth. Every coordinate then counts as how far it is from
    its mean over the positions that are read, in units of its deviation over them, and of two
    neighbours the second has the opposite sign of the first: a few coordinates of a trained model
    are large everywhere, and most of the noise of a plain sum is theirs.
    """

    scaled: bool = False

    @property
    def fewest(self) -> int:
        """Positions that a nonce must have: over one or two, a deviation says nothing."""
        return _FEWEST_SCALED if self.scaled else 1

    def first(self, seq_len: int) -> int:
        """Return the first position that is read."""
        return seq_len // (8 if self.scaled else 2)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A frozen description of how a proof follows from the model's hidden states.

    Args:
        name: Value of ``--preset``.
        summary: One line for tables.
        read: Positions that are read: the ``last`` one, or a signed sum over :class:`Positions`.
        layers: Step on the hidden state after every decoder layer.
        hidden: Steps on the state that was read.
        head: Matrix that maps the state to logits.
        logits: Steps on the logits.
        output: ``distance`` to the target of the block, the ``vector`` itself in fp16, or the
            ``tokens`` that were decoded from a seeded prompt, with a vector of every 32nd state, or
            the ``points`` that are nearest to the states of a chain of inputs.
        texts: Form of the seed texts (:meth:`assay.poc.Round.text`); versioned ones come with
            256-bit input seeds.
        number_formats: Formats in which a proof is made unless a network agrees on another one, the
            default first; any format where empty. This is a rule of judging and not of computing,
            so it is not in the proof header.
        steps: Tokens or inputs that follow the prompt of a nonce one by one; 0 where a nonce is one
            forward pass.
        inputs: What the model reads: N(0, 1) in place of embeddings, or ``tokens`` drawn by the
            frame of the checkpoint, in which its states are centred and scaled as well.
    """

    name: str
    summary: str
    read: Literal["last"] | Positions = "last"
    layers: LayerStep = "none"
    hidden: tuple[Step, ...] = ()
    head: Literal["none", "trained", "random"] = "none"
    logits: tuple[Step, ...] = ()
    output: Literal["distance", "vector", "tokens", "points"] = "distance"
    texts: Literal["published", "versioned"] = "published"
    number_formats: tuple[str, ...] = ()
    steps: int = 0
    inputs: Literal["noise", "tokens"] = "noise"

    @property
    def framed(self) -> bool:
        """Whether the pipeline needs the frame of the checkpoint
        (:class:`assay.models.frame.Frame`).
        """
        return self.inputs == "tokens"

    @property
    def draws_for_block(self) -> bool:
        """Whether anything is drawn for the block: the target, the random head, or a layer step."""
        return self.output == "distance" or self.head == "random" or self.layers != "none"

    @cached_property
    def vector_size(self) -> int:
        """Length of a published vector; 0 where a distance or points are published."""
        if self.output == "points":
            return 0
        return next((step.count for step in self.hidden if step.name in ("pick", "project")), 0)

    @cached_property
    def vector_count(self) -> int:
        """Number of published vectors of a nonce: a sketch of every 32nd token, or one."""
        return len(sketch_steps(self.steps)) or 1

    @property
    def noise(self) -> str:
        """Family of honest noise: a law that was measured in one family does not hold in
        another.
        """
        if self.steps:
            return self.output if self.steps >= _MANY_STEPS else f"few {self.output}"
        if self.framed:
            return f"token {self.output}"
        return self.output if self.read == "last" else f"scaled {self.output}"

    def output_size(self, hidden_size: int, vocab_size: int) -> int:
        """Return the dimension of the space in which the distance is measured."""
        if self.output == "points":
            return SPHERE_POINTS
        if self.output != "distance":
            return self.vector_size * self.vector_count
        return {"none": hidden_size, "trained": vocab_size, "random": RANDOM_HEAD_ROWS}[self.head]

    def as_dict(self) -> dict[str, Any]:
        """Return the description for a proof header.

        Fields that the first proofs did not have are written only where they say something else.
        """
        described = asdict(self)
        del described["number_formats"]
        for name, first in (("texts", "published"), ("steps", 0), ("inputs", "noise")):
            if described[name] == first:
                del described[name]
        if isinstance(
            self.read, Positions
        ):  # the count is that of drawn positions, which none draws any more
            described["read"] = {"count": 0, "scaled" if self.read.scaled else "later": True}
        return described


_UNIT = Step("unit")
_SIGNS = Step("signs")
_PERMUTE = Step("permute")
_REFLECT_8 = Step("reflect", 8)

_ROWS = (
    Pipeline(
        name="poc-2.0",
        summary="signs, unit, 8 reflections, random head (the default)",
        hidden=(_SIGNS, _UNIT, _REFLECT_8),
        head="random",
    ),
    Pipeline(
        name="artifact",
        summary="unit, pick 12, 11 reflections, unit; the vector is published",
        hidden=(_UNIT, Step("pick", 12), Step("rotate", 11), _UNIT),
        output="vector",
    ),
    Pipeline(
        name="hardened",
        summary="scaled states of seven eighths with signs, unit, projection to 32, unit; the "
        "vector is published",
        read=Positions(scaled=True),
        hidden=(_UNIT, Step("project", 32), _UNIT),
        output="vector",
        texts="versioned",
        number_formats=("float16", "float32"),
    ),
    Pipeline(
        name="tokens-1",
        summary="random tokens; framed states of the second half with signs, unit, projection to "
        "32, unit; the vector",
        inputs="tokens",
        read=Positions(),
        hidden=(_UNIT, Step("project", 32), _UNIT),
        output="vector",
        texts="versioned",
    ),
    Pipeline(
        name="decode",
        summary="256 tokens decoded from a seeded prompt with seeded noise; tokens and sketches "
        "are published",
        hidden=(_UNIT, Step("project", SKETCH_SIZE), _UNIT),
        head="trained",
        output="tokens",
        texts="versioned",
        steps=256,
    ),
    Pipeline(
        name="chain-decode",
        summary="256 seeded inputs after seeded noise, each from the point before it; the points "
        "are published",
        layers="reflect",
        hidden=(_UNIT, Step("pick", SPHERE_SIZE), _UNIT),
        output="points",
        steps=256,
    ),
    Pipeline(
        name="permutation",
        summary="logits permuted (the baseline)",
        head="trained",
        logits=(_PERMUTE,),
    ),
    Pipeline(
        name="logit-reflections",
        summary="8 reflections on the logits",
        head="trained",
        logits=(_REFLECT_8,),
    ),
    Pipeline(name="logit-signs", summary="signs on the logits", head="trained", logits=(_SIGNS,)),
    Pipeline(
        name="layer-signs", summary="signs between the layers", layers="signs", head="trained"
    ),
    Pipeline(
        name="layer-signs-permutation",
        summary="signs between the layers, logits permuted",
        layers="signs",
        head="trained",
        logits=(_PERMUTE,),
    ),
    Pipeline(
        name="hidden-reflections",
        summary="8 reflections on the hidden state, trained head",
        hidden=(_REFLECT_8,),
        head="trained",
    ),
    Pipeline(name="random-head", summary="random head alone", head="random"),
    Pipeline(
        name="end-normalize",
        summary="unit at the end only, random head",
        hidden=(_UNIT,),
        head="random",
    ),
    Pipeline(
        name="layer-normalize",
        summary="unit and reflection after every layer, 8 reflections, random head",
        layers="normalize_reflect",
        hidden=(_REFLECT_8, _UNIT),
        head="random",
    ),
    Pipeline(
        name="layer-reflections",
        summary="reflection after every layer, then as artifact",
        layers="reflect",
        hidden=(_UNIT, Step("pick", 12), Step("rotate", 11), _UNIT),
        output="vector",
    ),
)

PIPELINES: dict[str, Pipeline] = {row.name: row for row in _ROWS}
"""Every pipeline by its name."""
FORWARD = tuple(row.name for row in _ROWS if not row.steps and not row.framed)
"""Names of the rows whose nonces are one forward pass over noise."""


def get_pipeline(name: str) -> Pipeline:
    """Return the row of the table with this name; ``sign-flips`` is another name of ``poc-2.0``.

    ``decode-64`` is the row ``decode`` with 64 steps instead of 256, and so on from 32 to 4096;
    ``chain-decode-64`` likewise, from 1 to 4096.

    Raises:
        UsageError: The table has no such row.

    Example:
        >>> get_pipeline("decode-64").steps
        64
    """
    pipeline = find_pipeline(name) if isinstance(name, str) else None
    if pipeline is None:
        close = get_close_matches(str(name), PIPELINES, n=1)
        do = f"did you mean {close[0]}?" if close else "use poc-2.0, the default"
        raise UsageError(f"preset {name!r}", wanted="one of " + ", ".join(PIPELINES), do=do)
    return pipeline


def find_pipeline(name: str) -> Pipeline | None:
    """Return the row of the table with this name, or None."""
    name = _ALIASES.get(name, name)
    if (counted := _STEPS.fullmatch(name)) is None:
        return PIPELINES.get(name)
    row = PIPELINES[counted[1]]
    steps = int(counted[2])
    fewest = _FEWEST_STEPS if row.output == "tokens" else 1
    if not fewest <= steps <= _MOST_STEPS:
        return None
    return replace(
        row, name=name, summary=row.summary.replace(str(row.steps), counted[2]), steps=steps
    )


def runs_on_vllm(pipeline: Pipeline) -> bool:
    """Return whether vLLM runs a pipeline: no steps between layers, no trained head but to decode.

    vLLM's compiled layers take no hooks, and it spreads the trained head over its workers. The
    points of a chain are read there as well, where its layers run eagerly.
    """
    if pipeline.output == "points":
        return True
    return pipeline.layers == "none" and (pipeline.head != "trained" or pipeline.steps > 0)


def unsupported(
    pipeline: Pipeline, engine: str, supports: Callable[[Pipeline], bool]
) -> UsageError:
    """Return the refusal of a pipeline on an engine, with the presets that it supports."""
    return UsageError(
        f"preset {pipeline.name} on the {engine} engine",
        wanted=f"one of {', '.join(name for name, row in PIPELINES.items() if supports(row))}",
        do="choose one of them with --preset, or use --engine hf in one process",
    )


def check_frame_file(pipeline: Pipeline, path: Path | None) -> None:
    """Refuse a missing frame file where one is needed, and one that is not read."""
    if path is None:
        check_frame(pipeline, None)
    elif not pipeline.framed:
        raise UsageError(
            f"--frame with preset {pipeline.name}",
            wanted="no frame: only tokens-1 reads one",
            do="leave --frame out, or choose tokens-1",
        )


def check_frame(
    pipeline: Pipeline, frame: "Frame | None", *, hidden_size: int = 0, vocab_size: int = 0
) -> None:
    """Refuse a missing frame where one is needed, and one of another model shape."""
    if not pipeline.framed:
        return
    do = "make it with `assay poc frame`, and name the file in pins.toml, or with --frame"
    if frame is None:
        raise UsageError(
            f"{pipeline.name} without a frame", wanted="the frame of the checkpoint", do=do
        )
    if (len(frame.mean), frame.rows) != (hidden_size, vocab_size):
        raise UsageError(
            f"a frame of {len(frame.mean)} coordinates and {frame.rows} tokens",
            wanted=f"{hidden_size} and {vocab_size}, as the model has",
            do=do,
        )
