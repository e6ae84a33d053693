"""Pins: the values of a proof that a validator fixes, and those taken on the prover's word.

A build says which engines a network allows, as what their fingerprints may say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from assay import streams
from assay.errors import ProofMismatch, UsageError
from assay.files.names import normal_form
from assay.poc.protocol.checks import MAX_NONCE, check_digest, check_number
from assay.poc.protocol.fingerprint import SEPARATOR, Fingerprint
from assay.poc.protocol.header import Header
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.round import MAX_COUNT, Round
from assay.poc.protocol.strict_file import Text, must
from assay.settings import NUMBER_FORMATS

# Caches of keys and values in fewer bits than the model's dtype has.
CACHES = ("fp8_e4m3-cache",)

_PLUS = "+"
_OF_WEIGHTS = (*streams.DTYPES, *NUMBER_FORMATS)

FORMATS = (
    *_OF_WEIGHTS,
    *(f"{weights}{_PLUS}{cache}" for cache in CACHES for weights in _OF_WEIGHTS),
)
"""Every number format that a fingerprint may name: that of the weights, and after a plus that of a
cache.

Honest noise is that of the format, so the name has whatever moves results as far as a format does.
"""

ANY = "*"
# Nonces of the smallest proof that is accepted without a pinned set of them.
FEWEST_NONCES = 32
# Positions that a header may make a validator compute for one nonce.
LONGEST_UNPINNED = 4096


def with_cache(dtype: str, cache: str) -> str:
    """Return a number format with that of the cache, which may be empty.

    Example:
        >>> with_cache("bfloat16", "fp8_e4m3-cache"), with_cache("bfloat16", "")
        ('bfloat16+fp8_e4m3-cache', 'bfloat16')
    """
    return f"{dtype}{_PLUS}{cache}" if cache else dtype


def of_weights(dtype: str) -> str:
    """Return the format of the weights, without that of the cache.

    Example:
        >>> of_weights("bfloat16+fp8_e4m3-cache")
        'bfloat16'
    """
    return dtype.partition(_PLUS)[0]


OneOrMore = (
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str | int) else value),
)
Words = Annotated[
    tuple[Annotated[Text, AfterValidator(must(bool, 'the words of a fingerprint, or "*"'))], ...],
    *OneOrMore,
]
Counts = Annotated[tuple[Annotated[int, Field(strict=True, ge=0)] | Literal["*"], ...], *OneOrMore]
Sizes = Annotated[tuple[Annotated[int, Field(strict=True, ge=1)] | Literal["*"], ...], *OneOrMore]
Formats = Annotated[
    tuple[Annotated[str, BeforeValidator(must(FORMATS.__contains__, " or ".join(FORMATS)))], ...],
    *OneOrMore,
]


class Build(BaseModel):
    """An allowed build: for every field of a fingerprint the allowed values.

    A value is a text, or a list of which each will do. ``"*"`` allows any, and a text that ends
    with ``*`` any that begins so, such as ``"2.9.*"``. The dtype has no wildcard: honest noise is
    that of the number format, so a prover that may choose it chooses how wide the law is. Positions
    of a nonce belong to the round.

    Args:
        name: Name of the build, for people.
        engine: Names of engines, ``hf`` or ``vllm``.
        device: Names of processors or GPUs.
        dtype: Number formats of the weights, with that of a cache that rounds: :data:`FORMATS`.
        attention: Names of attention implementations.
        batch_size: Numbers of nonces of a batch.
        threads: Numbers of CPU threads; 0 on a GPU.
        torch: Versions of torch.
        library: Libraries that run the model, with their versions.
        kernels: Choices beside the defaults of the library, each list of them as one text, joined
            by commas; ``""`` for none.

    Example:
        >>> known = {"name": "H100", "engine": "vllm"}
        >>> known |= {"device": "NVIDIA H100*", "dtype": "bfloat16"}
        >>> names = "attention", "batch_size", "threads", "torch", "library", "kernels"
        >>> free = dict.fromkeys(names, "*")
        >>> Build.model_validate(known | free).free
        ('device', 'attention', 'batch_size', 'threads', 'torch', 'library', 'kernels')
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[Text, AfterValidator(normal_form)] = ""
    engine: Words
    device: Words
    dtype: Formats
    attention: Words
    batch_size: Sizes
    threads: Counts
    torch: Words
    library: Words
    kernels: Annotated[tuple[Text, ...], *OneOrMore]

    @classmethod
    def of(cls, fingerprint: Fingerprint, *, name: str = "") -> "Build":
        """Return the build that allows this fingerprint alone, at any number of positions.

        Raises:
            UsageError: A text of the fingerprint is a wildcard or cannot be printed, or its dtype
                is no number format.
        """
        stated = describe_build(fingerprint)
        odd = [field for field, value in stated.items() if str(value).endswith(ANY)]
        try:
            build = cls.model_validate({"name": name, **stated})
        except ValidationError as error:
            odd = [str(error.errors()[0]["loc"][0]), *odd]
        if odd:
            raise UsageError(
                f"a fingerprint with {odd[0]} {stated[odd[0]]!r:.60}",
                wanted="the plain words of an engine",
                do="take the build from an honest proof of this version",
            )
        return build

    def differing(self, fingerprint: Fingerprint) -> tuple[str, ...]:
        """Return the names of the fields in which a fingerprint is not of this build."""
        return tuple(
            name
            for name, value in describe_build(fingerprint).items()
            if not self.allows(name, value)
        )

    def allows(self, name: str, value: str | int) -> bool:
        """Return whether a field of a fingerprint may have a value."""
        return any(_matches(value, pinned) for pinned in getattr(self, name))

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fields with a wildcard."""
        return tuple(
            name
            for name in FIELDS
            if any(str(value).endswith(ANY) for value in getattr(self, name))
        )


FIELDS = tuple(name for name in Build.model_fields if name != "name")


def describe_build(fingerprint: Fingerprint) -> dict[str, str | int]:
    """Return the fields of a fingerprint that a build names, with the kernels as one text."""
    kernels = {"kernels": SEPARATOR.join(fingerprint.kernels)}
    return {name: getattr(fingerprint, name) for name in FIELDS} | kernels


def nearest_build(
    builds: Sequence[Build], fingerprint: Fingerprint
) -> tuple[Build | None, tuple[str, ...]]:
    """Return the build nearest to an engine, or None, and the fields that differ."""
    candidates = ((build, build.differing(fingerprint)) for build in builds)
    return min(candidates, key=lambda pair: len(pair[1]), default=(None, ()))


def _matches(stated: str | int, pinned: str | int) -> bool:
    if isinstance(pinned, str) and pinned.endswith(ANY):
        return str(stated).startswith(pinned.removesuffix(ANY))
    return stated == pinned


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Values that a validator knows before it reads a proof; None where it gives nothing.

    A value that is not given is accepted at its published default: preset ``poc-2.0``, 256
    positions, 32-bit seeds, r_target 1.416, node 0 of 1, at least 32 consecutive nonces of the
    share from any position on, and a number format of the preset, or any dtype where the preset
    names none. The block and the key have no default. Whatever is neither given nor at its default
    is taken on the prover's word, and :meth:`unpinned` names it.

    Args:
        block_hash: Block that seeds the round.
        public_key: Key of the node that is paid.
        block_height: Height of the block; part of no seed, so nothing depends on it.
        node_id: Number of the node, from 0 or from 1.
        node_count: Number of nodes that share the nonces of the key.
        model: Reference that the header must state; the checkpoint itself is compared by its
            digest.
        preset: Name of a row of :data:`assay.poc.PIPELINES`.
        seq_len: Number of positions of a nonce.
        r_target: Distance below which a nonce is valid.
        strength: Bits of seed of the inputs.
        nonces: All nonces of the proof, in order.
        prover_dtype: Number format that the prover states.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model.
        builds: Builds of which the prover's engine must be one; they name its number format.
        fewest_nonces: Number of nonces of the smallest proof; they are consecutive in the share,
            from any position on.

    Raises:
        UsageError: A value is out of range.
    """

    block_hash: str | None = None
    public_key: str | None = None
    block_height: int | None = None
    node_id: int | None = None
    node_count: int | None = None
    model: str | None = None
    preset: str | None = None
    seq_len: int | None = None
    r_target: float | None = None
    strength: Literal[32, 256] | None = None
    nonces: Sequence[int] | None = None
    prover_dtype: str | None = None
    digest: str | None = None
    weights: str | None = None
    builds: tuple[Build, ...] | None = None
    fewest_nonces: int | None = None

    def __post_init__(self) -> None:
        if self.preset is not None:
            object.__setattr__(self, "preset", get_pipeline(self.preset).name)
        values: dict[str, Any] = {
            "block_hash": "any",
            "public_key": "any",
            "node_count": MAX_NONCE,
            **{name: getattr(self, name) for name in self._of_round},
        }
        round = Round(**values)
        if self.strength is not None:
            # A preset with versioned texts always has 256.
            object.__setattr__(self, "strength", round.strength)
        if self.prover_dtype is not None and self.prover_dtype not in FORMATS:
            raise UsageError(
                f"number format {self.prover_dtype!r:.40}",
                wanted=" or ".join(FORMATS),
                do="choose one of them",
            )
        if self.digest is not None:
            check_digest("digest", self.digest)
        if self.fewest_nonces is not None:
            check_number("fewest_nonces", self.fewest_nonces, 1, MAX_COUNT)
        if self.builds is not None and not self.builds:
            raise UsageError(
                "no build at all", wanted="at least one", do="leave builds out to allow any"
            )

    @classmethod
    def of(cls, round: Round) -> "Pins":
        """Return pins of all that a round says, and of the model only if the round names one."""
        return cls(**{**round.as_dict(), "model": round.model or None})

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the values that are pinned."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def _of_round(self) -> tuple[str, ...]:
        return tuple(name for name in self.given if name in Round.__dataclass_fields__)

    @property
    def formats(self) -> tuple[str, ...]:
        """Number formats that the pins allow; empty where they say nothing of them."""
        if self.prover_dtype is not None:
            return (self.prover_dtype,)
        return tuple(dict.fromkeys(dtype for build in self.builds or () for dtype in build.dtype))

    def build_of(self, fingerprint: Fingerprint) -> str:
        """Return the name of an engine's pinned build, or its number format without one."""
        names = (build.name for build in self.builds or () if not build.differing(fingerprint))
        return next(filter(None, names), fingerprint.dtype)

    def joined(self, further: "Pins", source: str) -> "Pins":
        """Return the pins of both; a UsageError names the flag of a value that differs."""
        theirs = {name: getattr(further, name) for name in further.given}
        ours = {name: value for name in theirs if (value := getattr(self, name)) is not None}
        odd = [name for name, value in ours.items() if not _equal(value, theirs[name])]
        if (
            further.prover_dtype is not None
            and self.formats
            and further.prover_dtype not in self.formats
        ):
            odd = [*odd, "prover_dtype"]
            ours = ours | {"prover_dtype": " or ".join(self.formats)}
        if odd:
            name = odd[0]
            raise UsageError(
                f"--{name.replace('_', '-')} {theirs[name]!s:.60} beside {source}",
                wanted=f"{name} {ours[name]!s:.60}, as the network agreed there",
                do="leave the flag out, or correct one of the two",
            )
        return replace(self, **theirs)

    def differing(self, round: Round) -> tuple[str, ...]:
        """Return the names of the values of a round that contradict a pin."""
        return tuple(
            name
            for name in self._of_round
            if getattr(self, name) != _named(name, getattr(round, name))
        )

    def check(self, header: Header) -> None:
        """Refuse a header that contradicts a pin, or asks for far too much work."""
        claims = header.claims()
        for name in self.given:
            if not self._holds(name, header, claims[name]):
                raise ProofMismatch(
                    f"a proof with {name} {claims[name]!r:.60}",
                    wanted=f"{name} {getattr(self, name)!r:.60}",
                    # A pin stands in a file or is a flag, which a command line names by its field.
                    do=f"ask the node for its proof of this round, or correct the pinned {name}",
                    field=name,
                )
        self.check_engine(
            header.fingerprint, f"a proof of {header.pipeline.name}", header.pipeline.number_formats
        )
        if self.seq_len is None and header.positions > LONGEST_UNPINNED:
            raise ProofMismatch(
                f"a proof with seq_len {header.round.seq_len}, which nothing pins",
                wanted=f"at most {LONGEST_UNPINNED} positions: a header must not choose the work "
                f"of its validator",
                do=f"if the network agreed on that length, pass --seq-len {header.round.seq_len}",
                field="seq_len",
            )

    def check_engine(self, stated: Fingerprint, owner: str, default: Sequence[str] = ()) -> None:
        """Refuse an engine of another number format or build; the error names the difference.

        ``owner`` was made by the engine, and ``default`` are the formats that are allowed where
        nothing is pinned, any when empty.
        """
        formats = self.formats or default
        if formats and stated.dtype not in formats:
            raise ProofMismatch(
                f"{owner} made in {stated.dtype}",
                wanted=f"one made in {' or '.join(formats)}",
                do=f"ask the node to prove in {formats[0]}; only if the network agreed on it, pin "
                f"{stated.dtype}",
                field="prover_dtype",
            )
        build, odd = nearest_build(self.builds or (), stated)
        if odd:
            stated_build = describe_build(stated)
            raise ProofMismatch(
                f"{owner} made on another build: "
                + ", ".join(f"{name} {stated_build[name]!r:.60}" for name in odd),
                wanted=", ".join(
                    f"{name} {' or '.join(map(str, getattr(build, name)))}" for name in odd
                ),
                do="ask the node to prove on a build that the network agreed on; if it agreed on "
                "this one, add it",
                field="builds",
            )

    def _holds(self, name: str, header: Header, claim: Any) -> bool:
        """Return whether a claim of a header agrees with a value that is pinned; the engine is
        compared elsewhere.
        """
        pinned = getattr(self, name)
        if name == "nonces":
            return _equal(pinned, list(header.all_nonces()))
        # A set of nonces that is pinned may be any.
        if name == "fewest_nonces":
            return self.nonces is not None or _in_a_row(header, pinned)
        return name in ("builds", "prover_dtype") or bool(_named(name, claim) == pinned)

    def unpinned(self, header: Header) -> tuple[str, ...]:
        """Return the values taken on the prover's word: neither pinned nor at their default."""
        round = header.round
        pipeline = header.pipeline
        at_default = {
            "block_hash": False,
            "public_key": False,
            "preset": pipeline.name == Round.preset,
            "seq_len": round.seq_len == Round.seq_len,
            "strength": round.versioned or round.strength == Round.strength,
            "r_target": pipeline.output != "distance"
            or round.r_target == Round.r_target,  # others have none
            "node_id": round.node_id == Round.node_id,
            "node_count": round.node_count == Round.node_count,
            "nonces": self.fewest_nonces is not None or _in_a_row(header, FEWEST_NONCES),
            "prover_dtype": bool(self.formats)
            or header.fingerprint.dtype in (pipeline.number_formats or streams.DTYPES),
        }
        return tuple(
            name
            for name, default in at_default.items()
            if not default and getattr(self, name) is None
        )


def _named(name: str, value: Any) -> Any:
    """Return a value as pins have it: a preset that has two names by its own."""
    return get_pipeline(value).name if name == "preset" else value


def _in_a_row(header: Header, fewest: int) -> bool:
    """Return whether the nonces follow each other in the share, and are enough."""
    (first, end, step), *more = header.nonces
    return not more and step == header.round.node_count and len(range(first, end, step)) >= fewest


def _equal(first: Any, second: Any) -> bool:
    if hasattr(first, "__len__") and not isinstance(first, str):  # a numpy array too
        return len(first) == len(second) and all(a == b for a, b in zip(first, second, strict=True))
    return bool(first == second)


def check_extent(blocks: int, nonces: int, formats: Sequence[str]) -> None:
    """Refuse too few nonces for the tail of the noise, and unknown or repeated formats."""
    if blocks * nonces < 256 or min(blocks, nonces) < 1:
        raise UsageError(
            f"{blocks} blocks with {nonces} nonces",
            wanted="at least 256 in all",
            do="leave both out",
        )
    if not formats or len(set(formats) & set(FORMATS)) < len(formats):
        raise UsageError(
            f"the number formats {', '.join(formats) or 'none'}",
            wanted=f"each once of {', '.join(FORMATS)}",
            do="correct --dtype, or leave it out",
        )
