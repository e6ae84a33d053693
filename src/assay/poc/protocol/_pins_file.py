"""``pins.toml``: what a network agreed on, in one file for validators, services and nodes.

docs/pins.md describes every key. Reading is strict: an unknown key, a value of another type and one that is still to be
filled in are errors that name the key.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
)

from assay.errors import AssayError, DataError, UsageError
from assay.poc.protocol._build import Build
from assay.poc.protocol._pins import DIGEST, Pins
from assay.poc.protocol._pipelines import get_pipeline
from assay.poc.protocol._round import MAX_COUNT, MAX_NONCE, Round
from assay.reports import JsonObject, read_toml, read_whole

SCHEMA = 1
UNFILLED = "?"
"""Value of a key that the one who wrote the file could not know."""

LONGEST_CALIBRATION = 2**26


def _relative(text: str) -> str:
    if not text or PurePath(text).is_absolute():
        raise ValueError("a path that is relative to this file")
    return text


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Sha256 = Annotated[str, StringConstraints(pattern=f"^{DIGEST.pattern}$")]
Index = Annotated[int, Field(strict=True, ge=0, le=MAX_NONCE)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_NONCE)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RoundPins(_Table):
    """What holds for every round of the network, and what is known of this one.

    Args:
        preset: Name of a row of :data:`assay.poc.PIPELINES`.
        seq_len: Number of positions of a nonce.
        strength: Bits of seed of the inputs.
        r_target: Distance below which a nonce is valid; left out with a preset that publishes vectors.
        node_count: Number of machines of one key among which its nonces are dealt out.
        fewest_nonces: Number of nonces of the smallest proof.
        block_hash: Block of the round, where the file is written for one.
        block_height: Height of that block.
        nonces: Positions ``[first, end]`` in the share that a proof must hold; any consecutive ones when None.
    """

    preset: str
    seq_len: Count
    strength: Literal[32, 256]
    r_target: float | None = None
    node_count: Count
    fewest_nonces: Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
    block_hash: str | None = None
    block_height: Index | None = None
    nonces: Annotated[tuple[Index, Index], BeforeValidator(_pair)] | None = None


class NodePins(_Table):
    """A node that may prove.

    Args:
        public_key: Key of the node.
        node_id: Share of the node, from 0.
        node_count: Number of machines of this key; that of the round when None.
    """

    public_key: str
    node_id: Index
    node_count: Count | None = None


class PinnedFile(_Table):
    """A file beside the pins that must not change.

    Args:
        file: Path, relative to the folder of the pins.
        sha256: SHA-256 of its bytes.
    """

    file: Annotated[str, AfterValidator(_relative)]
    sha256: Sha256


class ModelPins(_Table):
    """A model that the network runs.

    Args:
        reference: Name under which requests ask for the model; the digest decides what it is.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode.
        builds: Builds that may prove it.
        calibrations: Files with the honest noise of these builds.
    """

    reference: str
    digest: Sha256
    weights: Literal["trained", "random-all", "random-embed"] = "trained"
    builds: Annotated[tuple[Build, ...], Field(min_length=1)]
    calibrations: tuple[PinnedFile, ...] = ()


class NetworkPins(_Table):
    """All that a network agreed on: the round, its nodes, and its models with their builds.

    Args:
        round: Values of every round.
        nodes: Nodes that may prove; any when empty.
        models: Models, by their digests.

    Example:
        >>> build = {"engine": "hf", "dtype": "bfloat16"}
        >>> build |= dict.fromkeys(("device", "attention", "batch_size", "threads", "torch", "library", "kernels"), "*")
        >>> model = {"reference": "reference:qwen3", "digest": "0" * 64, "builds": [build]}
        >>> round = {"preset": "hardened", "seq_len": 256, "strength": 256, "node_count": 1, "fewest_nonces": 64}
        >>> network = NetworkPins.of({"schema": 1, "round": round, "models": [model]}, "an example")
        >>> pins = network.for_round(block_hash="block_alpha", public_key="node_A")
        >>> pins.block_hash, pins.seq_len, pins.node_id, pins.formats
        ('block_alpha', 256, 0, ('bfloat16',))
    """

    round: RoundPins
    nodes: tuple[NodePins, ...] = ()
    models: Annotated[tuple[ModelPins, ...], Field(min_length=1)]
    _path: Path = PrivateAttr(default=Path("pins.toml"))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a pins file.

        Raises:
            DataError: The file cannot be read, is larger than 4 MiB, or is no pins file; names the key.
        """
        return cls.of(read_toml(path), path)

    @classmethod
    def of(cls, tables: JsonObject, path: str | Path) -> Self:
        """Return the pins that the tables of a file say.

        Args:
            tables: Content of the file.
            path: Path of the file, in whose folder calibrations are looked for.

        Raises:
            DataError: A key is unknown, missing or still to be filled in, or a value is impossible; names the key.
        """
        if type(tables.get("schema")) is not int or tables["schema"] != SCHEMA:
            raise DataError(
                f"{path}: schema {tables.get('schema')!r:.40}",
                wanted=f"schema = {SCHEMA}",
                do="write the file with `assay poc pins new`, or read it with the version that wrote it",
            )
        for place in _unfilled(tables):
            raise DataError(
                f'{path}: {place} is still "{UNFILLED}"',
                wanted="the value that the network agreed on",
                do='write it there; "*" allows any where docs/pins.md says so',
            )
        try:
            read = cls.model_validate({name: value for name, value in tables.items() if name != "schema"})
        except ValidationError as error:
            raise _data_error(cls, error, path) from None
        read._path = Path(path)
        try:
            read._check()
        except AssayError as error:
            raise DataError(f"{path}: {error.seen}", wanted=error.wanted, do=error.do) from None
        return read

    def model(self, name: str | None = None) -> ModelPins:
        """Return a model by its digest or reference; the only one when None.

        Raises:
            UsageError: There is no such model, or the name does not tell which one is meant.
        """
        found = [model for model in self.models if name in (None, model.digest, model.reference)]
        if len(found) != 1:
            names = ", ".join(f"{model.reference} ({model.digest[:12]})" for model in self.models)
            raise UsageError(
                f"model {name!r:.80} beside {self._path}" if name else f"several models in {self._path}",
                wanted=f"one of {names:.400}",
                do="use a model that the network agreed on, or add it to the pins",
            )
        return found[0]

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
        named = {"block_hash": block_hash, "public_key": public_key, "node_id": node_id}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        known = replace(also or Pins(), **given)
        share, chosen, positions = self._share(known), self.model(model), self.round.nonces
        whole: dict[str, Any] = {"block_hash": "any", "public_key": "any"} | share
        pins = replace(
            self._agreed,
            **share,
            nonces=None if positions is None else Round(**whole).nonces(*positions),
            digest=chosen.digest,
            weights=chosen.weights,
            builds=chosen.builds,
        )
        return pins.joined(known, str(self._path))

    def differing(self, round: Round) -> tuple[str, ...]:
        """Return the names of the values of a round that contradict the file, its node among them."""
        return self._agreed.differing(round) + self.foreign(round.public_key, round.node_id, round.node_count)

    def foreign(self, public_key: str, node_id: int, node_count: int) -> tuple[str, ...]:
        """Return what makes a share one of no node that the file lists: the name of the key or of the share."""
        own = [node for node in self.nodes if node.public_key == public_key]
        if not own:
            return ("public_key",) if self.nodes else () if node_count == self.round.node_count else ("node_count",)
        if (own[0].node_count or self.round.node_count) != node_count:
            return ("node_count",)
        return () if any(node.node_id == node_id for node in own) else ("node_id",)

    def calibrations(self, model: ModelPins) -> Iterator[Path]:
        """Iterate over the calibration files of a model, each after its hash was compared.

        Raises:
            DataError: A file cannot be read, or is another one than was pinned.
        """
        for pinned in model.calibrations:
            path = self._path.parent / pinned.file
            found = hashlib.sha256(read_whole(path, LONGEST_CALIBRATION)).hexdigest()
            if found != pinned.sha256:
                raise DataError(
                    f"{path} has the SHA-256 {found[:12]}…",
                    wanted=f"{pinned.sha256[:12]}…, the file that {self._path} pins",
                    do="fetch the file that the network agreed on, or agree on this one and pin it",
                )
            yield path

    @property
    def _agreed(self) -> Pins:
        """What holds for every node: all values of the round but the share."""
        named = [name for name in RoundPins.model_fields if name not in ("nonces", "node_count")]
        return Pins(**{name: getattr(self.round, name) for name in named})

    def _share(self, known: Pins) -> dict[str, Any]:
        """Return key and share of the node that is meant."""
        listed = [node for node in self.nodes if known.public_key in (None, node.public_key)]
        if self.nodes and not listed:
            raise UsageError(
                f"the key {known.public_key!r:.80}",
                wanted=f"one of the {len(self.nodes)} nodes of {self._path}",
                do="pass the --public-key of a node that the network knows, or add it under [[nodes]]",
            )
        if known.public_key is None and len({node.public_key for node in listed}) > 1:
            raise UsageError(
                f"no --public-key beside {self._path}",
                wanted=f"the key of one of its {len(self.nodes)} nodes",
                do="pass --public-key",
            )
        count = self.round.node_count if not listed else listed[0].node_count or self.round.node_count
        shares = [node.node_id for node in listed] or list(range(min(count, 2)))
        if known.node_id is None and len(shares) > 1:
            raise UsageError(
                f"no --node-id beside {self._path}, where the key has several shares",
                wanted="the share of the node",
                do="pass --node-id",
            )
        if listed and known.node_id not in (None, *shares):
            raise UsageError(
                f"--node-id {known.node_id} beside {self._path}",
                wanted=f"a share of this key there: {', '.join(map(str, shares)):.200}",
                do="pass the --node-id of a node that the network knows, or add it under [[nodes]]",
            )
        share: dict[str, Any] = {"node_id": shares[0] if known.node_id is None else known.node_id, "node_count": count}
        return share | ({"public_key": listed[0].public_key} if listed else {})

    def _check(self) -> None:
        """Refuse values that are possible alone and impossible together."""
        asked, pipeline = self.round, get_pipeline(self.round.preset)
        if (asked.r_target is None) is (pipeline.output == "distance"):
            raise UsageError(
                f"round.r_target {asked.r_target} with preset {pipeline.name}",
                wanted="a distance" if asked.r_target is None else "none: vectors have no target",
                do="correct one of the two",
            )
        _ = self._agreed
        if asked.nonces is not None:
            Round(block_hash="any", public_key="any", node_count=asked.node_count).nonces(*asked.nonces)
        counts: dict[str, int] = {}
        for node in self.nodes:
            count = node.node_count or asked.node_count
            Round(block_hash="any", public_key=node.public_key, node_id=node.node_id, node_count=count)
            if counts.setdefault(node.public_key, count) != count:
                raise UsageError(
                    f"nodes of the key {node.public_key!r:.80} with node_count {counts[node.public_key]} and {count}",
                    wanted="one node_count for each key",
                    do="correct one of them",
                )
        _refuse_doubles("node", [(node.public_key, node.node_id) for node in self.nodes])
        _refuse_doubles("model", [(model.digest, model.weights) for model in self.models])


def _refuse_doubles(what: str, values: list[tuple[Any, ...]]) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise UsageError(
                f"{what} {value[0]!r:.80} with {value[1]}, {times} times",
                wanted=f"every {what} once",
                do="remove the others",
            )


def _unfilled(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unfilled(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unfilled(inner, f"{place}[{index}]")
    elif value == UNFILLED:
        yield place


def _data_error(kind: type[BaseModel], error: ValidationError, path: str | Path) -> DataError:
    """Return the first fault of a file in three parts, naming the key by its place."""
    faults = error.errors(include_url=False)
    fault = next(
        (fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0]
    )  # a mistyped key misses as well
    place = ""
    table: type[BaseModel] | None = kind
    for step in fault["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
            continue
        if table is None:
            break  # the words of a union, which are no keys
        place += f".{step}" if place else step
        kind, table = table, _table_of(table.model_fields[step].annotation) if step in table.model_fields else None
    name, known = str(place.rpartition(".")[2]), list(kind.model_fields)
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(name, known, n=1)
        return DataError(
            f"{path}: unknown key {place}",
            wanted="one of " + ", ".join(known),
            do=f"did you mean {near[0]}?" if near else "remove it",
        )
    if fault["type"] == "missing":
        do = f'write it; {name} = "*" allows any' if kind is Build and name != "dtype" else "write it: see docs/pins.md"
        return DataError(f"{path}: no {place}", wanted="a value for it", do=do)
    wanted = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return DataError(f"{path}: {place} is {fault['input']!r:.60}", wanted=wanted, do="correct it: see docs/pins.md")


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the kind of table that a field holds, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_of(part))), None)
