"""``pins.toml``: what a network agreed on, in one file for validators, services and nodes.

docs/pins.md describes every key. Reading is strict: an unknown key, a value of another type and one
that is still to be filled in are errors that name the key.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from assay.errors import AssayError, DataError, UsageError
from assay.files.jsonl import JsonObject
from assay.files.names import existing_spelling, normal_form
from assay.files.reading import read_whole
from assay.files.toml import read_toml
from assay.poc.protocol.checks import DIGEST, MAX_NONCE, check_name, check_number
from assay.poc.protocol.pins import ANY, Build, Pins
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.round import MAX_COUNT, Round
from assay.poc.protocol.strict_file import Text, must

SCHEMA = 1
LONGEST_CALIBRATION = 2**26  # bytes
# Value of a key that the one who wrote the file could not know.
UNFILLED = "?"
HEAD = f"""\
# What the network agreed on. docs/pins.md describes every key.
# `assay poc pins check FILE` says what this leaves open: the block and the key come with each proof.
schema = {SCHEMA}"""  # noqa: E501
BUILD_FIELDS = {
    "engine": "hf or vllm",
    "device": "name of the GPU or processor, as in the fingerprint of a proof",
    "dtype": "number format; it has no wildcard",
    "attention": "name of the attention implementation",
    "batch_size": "nonces of a batch",
    "threads": "CPU threads; 0 on a GPU",
    "torch": "version of torch",
    "library": "library that runs the model, with its version",
    "kernels": 'further choices, joined by commas; "" for none',
}
"""Fields of a build, with what to write where no proof says it."""


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_is_value = must(
    lambda text: text not in ("", ANY),
    "the one value: only the fields of a build have wildcards",
)
_is_relative = must(
    lambda text: text and "\0" not in text and not PurePath(text).is_absolute(),
    "a path that is relative to this file",
)
Value = Annotated[Text, AfterValidator(_is_value)]
Name = Annotated[Value, AfterValidator(normal_form)]
Sha256 = Annotated[str, StringConstraints(pattern=f"^{DIGEST.pattern}$")]
Index = Annotated[int, Field(strict=True, ge=0, le=MAX_NONCE)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_NONCE)]


class Table(BaseModel):
    """A table of the file, whose keys are its fields and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RoundPins(Table):
    """What holds for every round of the network, and what is known of this one."""

    preset: Name  # name of a row of :data:`assay.poc.PIPELINES`
    seq_len: Count  # number of positions of a nonce
    strength: Literal[32, 256]  # bits of seed of the inputs
    # distance below which a nonce is valid; left out with a preset that publishes vectors
    r_target: Annotated[float, Field(strict=True)] | None = None
    node_count: Count  # number of machines of one key among which its nonces are dealt out
    # Number of nonces of the smallest proof.
    fewest_nonces: Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
    block_hash: Name | None = None  # block of the round, where the file is written for one
    block_height: Index | None = None  # height of that block
    # positions ``[first, end]`` in the share that a proof must hold; any consecutive ones when None
    nonces: Annotated[tuple[Index, Index], BeforeValidator(_pair)] | None = None


class Accepted(Table):
    """How many accounts a network has, and how many of honest nodes may be convicted in all."""

    # Accounts that there will ever be, with those of further keys, models and builds of a node.
    nodes: Count
    # Honest ones that are convicted, in expectation.
    false_convictions: Annotated[float, Field(strict=True, gt=0)]

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Return what a setting K/N says, such as 1/100000, or None for None."""
        convictions, _, nodes = (text or "").partition("/")
        try:
            return (
                None
                if text is None
                else cls(nodes=int(nodes), false_convictions=float(convictions))
            )
        except ValueError:
            raise UsageError(
                f"--false-convictions {text:.60}",
                wanted="false convictions of honest nodes over all nodes, fewer of the former",
                do="write, say, 1/100000",
            ) from None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.false_convictions >= self.nodes:
            raise ValueError("fewer false convictions than nodes")
        return self

    @property
    def alpha(self) -> float:
        """Bound on the chance that one honest account is ever convicted."""
        return self.false_convictions / self.nodes


class NodePins(Table):
    """A node that may prove."""

    public_key: Value  # key of the node
    node_id: Index  # number of the node, from 0 or from 1
    node_count: Count | None = None  # number of machines of this key; that of the round when None
    build: Name | None = None  # name of the build that it runs; any build of the model when None


class PinnedFile(Table):
    """A file beside the pins that must not change."""

    file: Annotated[str, AfterValidator(_is_relative)]  # path, relative to the folder of the pins
    sha256: Sha256  # SHA-256 of its bytes

    @classmethod
    def of(cls, path: Path, folder: Path) -> Self:
        """Return what pins a file for pins in a folder.

        Raises:
            DataError: The file cannot be read, or is longer than a calibration.
        """
        content = read_whole(path, LONGEST_CALIBRATION)
        return cls(file=os.path.relpath(path, folder), sha256=hashlib.sha256(content).hexdigest())


class ModelPins(Table):
    """A model that the network runs."""

    reference: Name  # name under which requests ask for the model; the digest decides what it is
    digest: Sha256  # SHA-256 of the tensors of the checkpoint
    weights: Literal["trained", "random-all", "random-embed"] = "trained"  # weight mode
    builds: Annotated[tuple[Build, ...], Field(min_length=1)]  # builds that may prove it
    calibrations: tuple[PinnedFile, ...] = ()  # files with the honest noise of these builds
    frame: PinnedFile | None = None  # frame of the checkpoint, for the presets that have one


def _unfilled(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unfilled(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unfilled(inner, f"{place}[{index}]")
    elif value == UNFILLED:
        yield place


def _fault_of(error: ValidationError, path: str | Path) -> DataError:
    """Return the first fault of a file in three parts, naming the key by its place."""
    faults = error.errors(include_url=False)
    # A mistyped key misses as well.
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    fault = (unknown or faults)[0]
    tables: dict[Any, type[BaseModel]] = {
        "network": Accepted,
        "round": RoundPins,
        "nodes": NodePins,
        "models": ModelPins,
        "builds": Build,
        "calibrations": PinnedFile,
        "frame": PinnedFile,
    }
    steps = list(fault["loc"])
    table = next((tables[step] for step in reversed(steps[:-1]) if step in tables), NetworkPins)
    while not unknown and isinstance(steps[-1], str) and steps[-1] not in table.model_fields:
        # The words of a union, which are no keys.
        steps.pop()
    place = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps
    ).removeprefix(".")
    name = place.rpartition(".")[2]
    if unknown:
        near = get_close_matches(name, table.model_fields, n=1)
        return DataError(
            f"{path}: unknown key {place}",
            wanted="one of " + ", ".join(table.model_fields),
            do=f"did you mean {near[0]}?" if near else "remove it",
        )
    if fault["type"] == "missing":
        free = table is Build and name != "dtype"
        do = f'write it; {name} = "*" allows any' if free else "write it: see docs/pins.md"
        return DataError(f"{path}: no {place}", wanted="a value for it", do=do)
    return DataError(
        f"{path}: {place} is {fault['input']!r:.60}",
        wanted=fault["msg"].removeprefix("Input should be ").removeprefix("Value error, "),
        do="correct it: see docs/pins.md",
    )


class NetworkPins(Table):
    """All that a network agreed on: the round, its nodes, and its models with their builds.

    Args:
        round: Values of every round.
        nodes: Nodes that may prove; any when empty.
        models: Models, by their digests.
        network: Size of the network and false convictions that it accepts; None where it does not
            say.

    Example:
        >>> build = {"engine": "hf", "dtype": "bfloat16"}
        >>> names = "device", "attention", "batch_size", "threads", "torch", "library", "kernels"
        >>> build |= dict.fromkeys(names, "*")
        >>> model = {"reference": "reference:qwen3", "digest": "0" * 64, "builds": [build]}
        >>> round = {"preset": "hardened", "seq_len": 256, "strength": 256}
        >>> round |= {"node_count": 1, "fewest_nonces": 64}
        >>> network = NetworkPins.of({"schema": 1, "round": round, "models": [model]}, "an example")
        >>> pins = network.for_round(block_hash="block_alpha", public_key="node_A")
        >>> pins.block_hash, pins.seq_len, pins.node_id, pins.formats
        ('block_alpha', 256, 0, ('bfloat16',))
    """

    round: RoundPins
    nodes: tuple[NodePins, ...] = ()
    models: Annotated[tuple[ModelPins, ...], Field(min_length=1)]
    network: Accepted | None = None
    _path: Path = PrivateAttr(default=Path("pins.toml"))
    _agreed: Pins = PrivateAttr()
    _of_key: dict[str, list[NodePins]] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a pins file.

        Raises:
            DataError: The file cannot be read, is larger than 4 MiB, or is no pins file; names the
                key.
        """
        return cls.of(read_toml(path), path)

    @classmethod
    def of(cls, tables: JsonObject, path: str | Path) -> Self:
        """Return the pins that the tables of a file say.

        Args:
            tables: Content of the file.
            path: Path of the file, in whose folder calibrations are looked for.

        Raises:
            DataError: A key is unknown, missing or still to be filled in, or a value is impossible;
                names the key.
        """
        schema = tables.get("schema")
        if type(schema) is not int or schema != SCHEMA:
            raise DataError(
                f"{path}: schema {schema!r:.40}",
                wanted=f"schema = {SCHEMA}",
                do="write the file with `assay poc pins new`, or read it with the version that "
                "wrote it",
            )
        for place in _unfilled(tables):
            raise DataError(
                f'{path}: {place} is still "{UNFILLED}"',
                wanted="the value that the network agreed on",
                do='write it there; docs/pins.md says where "*" allows any',
            )
        try:
            read = cls.model_validate(
                {name: value for name, value in tables.items() if name != "schema"}
            )
        except ValidationError as error:
            raise _fault_of(error, path) from None
        except AssayError as error:
            raise DataError(f"{path}: {error.seen}", wanted=error.wanted, do=error.do) from None
        read._path = Path(path)
        return read

    def model_post_init(self, context: Any) -> None:
        """Refuse values that are possible alone and impossible together."""
        round_pins = self.round
        pipeline = get_pipeline(self.round.preset)
        if (round_pins.r_target is None) is (pipeline.output == "distance"):
            raise UsageError(
                f"round.r_target {round_pins.r_target} with preset {pipeline.name}",
                wanted="a distance"
                if round_pins.r_target is None
                else "none: only distances have a target",
                do="correct one of the two",
            )
        if pipeline.framed and (
            bare := [model.reference for model in self.models if model.frame is None]
        ):
            raise UsageError(
                f"preset {pipeline.name} and no frame of {bare[0]:.80}",
                wanted="[models.frame]",
                do="make it with `assay poc frame`, and pin it: `assay poc pins new --frame`",
            )
        shared = (name for name in RoundPins.model_fields if name not in ("nonces", "node_count"))
        self._agreed = Pins(**{name: getattr(round_pins, name) for name in shared})
        # Only for the refusal of positions that no share has.
        if round_pins.nonces is not None:
            Round(block_hash="any", public_key="any", node_count=round_pins.node_count).nonces(
                *round_pins.nonces
            )
        names = {build.name for model in self.models for build in model.builds if build.name}
        for node in self.nodes:
            nodes_of_key = self._of_key.setdefault(node.public_key, [])
            self._check_node(node, nodes_of_key, names)
            nodes_of_key.append(node)
        shares = [(node.public_key, node.node_id % self._count(node)) for node in self.nodes]
        _refuse_doubles("node", shares)
        _refuse_doubles("model", [(model.digest, "the same digest") for model in self.models])

    def _check_node(self, node: NodePins, same_key: Sequence[NodePins], names: set[str]) -> None:
        count = self._count(node)
        check_name("public_key", node.public_key, do="pass the public key as the chain prints it")
        check_number("node_id", node.node_id, 0, count)
        # All nodes of one key have the same count.
        others = {self._count(other_node) for other_node in same_key[:1]} - {count}
        if others:
            raise UsageError(
                f"nodes of the key {node.public_key!r:.80} with node_count {others.pop()} and "
                f"{count}",
                wanted="one node_count for each key",
                do="correct one of them",
            )
        if node.build not in (None, *names):
            raise UsageError(
                f"a node with build {node.build!r:.80}",
                wanted=f"the name of a build: {', '.join(sorted(names)) or 'none has one':.400}",
                do="name the build under [[models.builds]], or leave it out of the node",
            )

    def _count(self, node: NodePins | None) -> int:
        """Return the number of machines of the key of a node."""
        return (node.node_count if node else None) or self.round.node_count

    def model(self, name: str | None = None) -> ModelPins:
        """Return a model by its digest or reference; the only one when None.

        Raises:
            UsageError: There is no such model, or the name does not tell which one is meant.
        """
        chosen = name and normal_form(name)
        matches = [
            model for model in self.models if chosen in (None, model.digest, model.reference)
        ]
        if len(matches) == 1:
            return matches[0]
        names = ", ".join(f"{model.reference} ({model.digest[:12]})" for model in self.models)
        problem = (
            f"one of {len(matches)} models"
            if matches
            else f"model {name!r:.80}, which {self._path} does not have"
        )
        raise UsageError(
            problem,
            wanted=f"{'the digest of ' if matches else ''}one of {names:.400}",
            do="use a model that the network agreed on, or add it to the pins",
            field="model",
        )

    def for_round(
        self,
        *,
        block_hash: str | None = None,
        public_key: str | None = None,
        node_id: int | None = None,
        model: str | None = None,
        also: Pins | None = None,
    ) -> Pins:
        """Return what is pinned of the proof of one node in one round.

        Args:
            block_hash: Block that seeds the round; that of the file when None.
            public_key: Key of the node. When the file lists nodes it must list this one.
            node_id: Share of the node; needed where the key has several.
            model: Digest or reference of the model; needed where the file has several.
            also: Further pins, for instance of flags, which must agree with the file.

        Raises:
            UsageError: A value contradicts the file, or the file does not say enough without it.
        """
        named: dict[str, Any] = {
            "block_hash": block_hash,
            "public_key": public_key,
            "node_id": node_id,
        }
        values = replace(
            also or Pins(), **{name: value for name, value in named.items() if value is not None}
        )
        node = self._node(values)
        chosen = self.model(model)
        share = values.node_id or 0 if node is None else node.node_id
        pins = self.for_share(chosen, self._builds(chosen, node), share, self._count(node))
        if node is not None:
            pins = replace(pins, public_key=node.public_key)
        return pins.joined(values, str(self._path))

    def for_share(
        self, model: ModelPins, builds: tuple[Build, ...], node_id: int, node_count: int
    ) -> Pins:
        """Return what is pinned of the proofs of a share, whether or not the file lists its
        node.
        """
        any_round = Round(
            block_hash="any", public_key="any", node_id=node_id, node_count=node_count
        )
        positions = self.round.nonces
        return replace(
            self._agreed,
            node_id=node_id,
            node_count=node_count,
            nonces=None if positions is None else any_round.nonces(*positions),
            digest=model.digest,
            weights=model.weights,
            builds=builds,
        )

    def _node(self, pins: Pins) -> NodePins | None:
        """Return the node that is meant; None where the file lists none."""
        count = self.round.node_count
        key = pins.public_key
        share = pins.node_id
        of_key = self._of_key.get(key or self.nodes[0].public_key, []) if self.nodes else []
        matches = [node for node in of_key if share in (None, node.node_id)]

        for is_lacking, flag, wanted in (
            (
                not self.nodes and share is None and count > 1,
                "--node-id",
                f"the share of the node, one of {count}",
            ),
            (
                key is None and len(self._of_key) > 1,
                "--public-key",
                f"the key of one of its {len(self._of_key)} nodes",
            ),
            (len(matches) > 1, "--node-id", f"one of the {len(of_key)} shares of this key"),
        ):
            if is_lacking:
                raise UsageError(f"no {flag} beside {self._path}", wanted=wanted, do=f"pass {flag}")
        if matches or (not self.nodes and (share or 0) <= count):
            return matches[0] if matches else None
        if not self.nodes:
            problem = f"--node-id {share} beside {self._path}"
            expected = f"a share up to its node_count, {count}"
        elif not of_key:
            problem = f"the key {key!r:.80}"
            expected = f"one of the {len(self._of_key)} that {self._path} lists"
        else:
            shares = ", ".join(str(node.node_id) for node in of_key)
            problem = f"node_id {share} of the key {of_key[0].public_key!r:.80}"
            expected = f"one of {self._path}: {shares:.200}"
        raise UsageError(
            problem,
            wanted=expected,
            do="name a node that the network knows, or add it under [[nodes]]",
        )

    def _builds(self, model: ModelPins, node: NodePins | None) -> tuple[Build, ...]:
        if node is None or node.build is None:
            return model.builds
        if named := tuple(build for build in model.builds if build.name == node.build):
            return named
        raise UsageError(
            f"a node of build {node.build!r:.80} with {model.reference}",
            wanted=f"a build of that name under this model in {self._path}",
            do="correct the build of the node, or add it to the model",
        )

    def differing(self, round: Round) -> tuple[str, ...]:
        """Return the values of a round that contradict the file, apart from key and share."""
        return self._agreed.differing(round)

    def foreign(self, public_key: str, node_id: int, node_count: int) -> tuple[str, ...]:
        """Return the names of what makes a share one of no node of the network."""
        of_key = self._of_key.get(public_key, [])
        if self.nodes and not of_key:
            return ("public_key",)
        if node_count != self._count(of_key[0] if of_key else None):
            return ("node_count",)
        return () if not of_key or any(node.node_id == node_id for node in of_key) else ("node_id",)

    def calibrations(self, model: ModelPins) -> Iterator[Path]:
        """Iterate over the calibration files of a model; a DataError on another hash."""
        yield from map(self._pinned, model.calibrations)

    def frame(self, digest: str) -> Path | None:
        """Return the frame file of a model, or None; a DataError on another hash."""
        pinned = next((model.frame for model in self.models if model.digest == digest), None)
        return None if pinned is None else self._pinned(pinned)

    def _pinned(self, pinned: PinnedFile) -> Path:
        path = existing_spelling(self._path.parent / pinned.file)
        on_disk = PinnedFile.of(path, path.parent)
        if on_disk.sha256 != pinned.sha256:
            raise DataError(
                f"{path} has the SHA-256 {on_disk.sha256[:12]}…",
                wanted=f"{pinned.sha256[:12]}…, the file that {self._path} pins",
                do="fetch the file that the network agreed on, or agree on this one and pin it",
            )
        return path


def _refuse_doubles(kind: str, values: list[tuple[Any, ...]]) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise UsageError(
                f"{kind} {value[0]!r:.80} with {value[1]}, {times} times",
                wanted=f"every {kind} once",
                do="remove the others",
            )


def pins_text(tables: Iterable[tuple[str, Mapping[str, object]]]) -> str:
    """Return a pins file as text.

    Args:
        tables: Names of the tables as TOML has them, such as ``[[models]]``, with their values in
            order. A value ``"?"`` is marked as required, and the file is refused until it is
            replaced.
    """
    lines = [HEAD]
    for name, values in tables:
        lines += ["", name]
        for key, value in values.items():
            # Texts of TOML are those of JSON, but for one control character that JSON does not
            # escape.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(
                f"{key} = {text}"
                + (f"  # required: {BUILD_FIELDS[key]}" if value == UNFILLED else "")
            )
    return "\n".join([*lines, ""])
