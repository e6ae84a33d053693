"""``pins.toml``: what a network agreed on, in one file for validators, services and nodes.

docs/pins.md describes every key. Reading is strict: an unknown key, a value of another type and one that is still to be
filled in are errors that name the key.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, ValidationError

from assay.errors import AssayError, DataError, UsageError
from assay.poc.protocol._build import Build
from assay.poc.protocol._pins import Pins
from assay.poc.protocol._pins_tables import ModelPins, NodePins, RoundPins, Table, check_tables, fault_of, sha256_of
from assay.poc.protocol._pipelines import get_pipeline
from assay.poc.protocol._round import Round
from assay.reports import JsonObject, read_toml


class NetworkPins(Table):
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
    _agreed: Pins = PrivateAttr()
    _of_key: dict[str, list[NodePins]] = PrivateAttr(default_factory=dict)

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
        values = check_tables(tables, path)
        try:
            read = cls.model_validate(values)
        except ValidationError as error:
            raise fault_of(cls, error, path) from None
        except AssayError as error:
            raise DataError(f"{path}: {error.seen}", wanted=error.wanted, do=error.do) from None
        read._path = Path(path)
        return read

    def model_post_init(self, context: Any) -> None:
        """Refuse values that are possible alone and impossible together."""
        asked, pipeline = self.round, get_pipeline(self.round.preset)
        if (asked.r_target is None) is (pipeline.output == "distance"):
            raise UsageError(
                f"round.r_target {asked.r_target} with preset {pipeline.name}",
                wanted="a distance" if asked.r_target is None else "none: only distances have a target",
                do="correct one of the two",
            )
        shared = (name for name in RoundPins.model_fields if name not in ("nonces", "node_count"))
        self._agreed = Pins(**{name: getattr(asked, name) for name in shared})
        if asked.nonces is not None:
            Round(block_hash="any", public_key="any", node_count=asked.node_count).nonces(*asked.nonces)
        for node in self.nodes:
            self._check_node(node)
            self._of_key.setdefault(node.public_key, []).append(node)
        _refuse_doubles("node", [(node.public_key, node.node_id) for node in self.nodes])
        _refuse_doubles("model", [(model.digest, "the same digest") for model in self.models])

    def _check_node(self, node: NodePins) -> None:
        count = node.node_count or self.round.node_count
        Round(block_hash="any", public_key=node.public_key, node_id=node.node_id, node_count=count)
        others = {other.node_count or self.round.node_count for other in self._of_key.get(node.public_key, ())}
        if others - {count}:
            raise UsageError(
                f"nodes of the key {node.public_key!r:.80} with node_count {others.pop()} and {count}",
                wanted="one node_count for each key",
                do="correct one of them",
            )
        names = {build.name for model in self.models for build in model.builds if build.name}
        if node.build not in (None, *names):
            raise UsageError(
                f"a node with build {node.build!r:.80}",
                wanted=f"the name of a build: {', '.join(sorted(names)) or 'none has one':.400}",
                do="name the build under [[models.builds]], or leave it out of the node",
            )

    def model(self, name: str | None = None) -> ModelPins:
        """Return a model by its digest or reference; the only one when None.

        Raises:
            UsageError: There is no such model, or the name does not tell which one is meant.
        """
        found = [model for model in self.models if name in (None, model.digest, model.reference)]
        if len(found) != 1:
            seen = (
                f"model {name!r:.80}, which {self._path} does not have" if not found else f"one of {len(found)} models"
            )
            names = ", ".join(f"{model.reference} ({model.digest[:12]})" for model in self.models)
            raise UsageError(
                seen,
                wanted=f"one of {names:.400}" if not found else f"the digest of one of {names:.400}",
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
        node, chosen, positions = self._node(known), self.model(model), self.round.nonces
        share: dict[str, Any] = {"node_id": known.node_id or 0, "node_count": self.round.node_count}
        if node is not None:
            share |= {"node_id": node.node_id, "node_count": node.node_count or self.round.node_count}
            share |= {"public_key": node.public_key}
        whole: dict[str, Any] = {"block_hash": "any", "public_key": "any"} | share
        pins = replace(
            self._agreed,
            **share,
            nonces=None if positions is None else Round(**whole).nonces(*positions),
            digest=chosen.digest,
            weights=chosen.weights,
            builds=self._builds(chosen, node),
        )
        return pins.joined(known, str(self._path))

    def _node(self, known: Pins) -> NodePins | None:
        """Return the node that is meant; None where the file lists none."""
        if not self.nodes:
            if known.node_id is None and self.round.node_count > 1:
                raise self._more("node_id", f"the share of the node, one of {self.round.node_count}")
            if (known.node_id or 0) >= self.round.node_count:
                raise UsageError(
                    f"--node-id {known.node_id} beside {self._path}",
                    wanted=f"a share below its node_count, {self.round.node_count}",
                    do="leave the flag out, or correct one of the two",
                )
            return None
        if known.public_key is None and len(self._of_key) > 1:
            raise self._more("public_key", f"the key of one of its {len(self._of_key)} nodes")
        own = self._of_key.get(known.public_key or self.nodes[0].public_key, [])
        if not own:
            raise UsageError(
                f"the key {known.public_key!r:.80}",
                wanted=f"one of the {len(self._of_key)} that {self._path} lists",
                do="pass the --public-key of a node that the network knows, or add it under [[nodes]]",
            )
        if known.node_id is None and len(own) > 1:
            raise self._more("node_id", f"one of the {len(own)} shares of this key")
        found = [node for node in own if known.node_id in (None, node.node_id)]
        if not found:
            raise UsageError(
                f"node_id {known.node_id} of the key {own[0].public_key!r:.80}",
                wanted=f"a share that {self._path} lists: {', '.join(str(node.node_id) for node in own):.200}",
                do="pass the --node-id of a node that the network knows, or add it under [[nodes]]",
            )
        return found[0]

    def _more(self, name: str, wanted: str) -> UsageError:
        flag = f"--{name.replace('_', '-')}"
        return UsageError(f"no {flag} beside {self._path}", wanted=wanted, do=f"pass {flag}")

    def _builds(self, model: ModelPins, node: NodePins | None) -> tuple[Build, ...]:
        if node is None or node.build is None:
            return model.builds
        named = tuple(build for build in model.builds if build.name == node.build)
        if not named:
            raise UsageError(
                f"a node of build {node.build!r:.80} with {model.reference}",
                wanted=f"a build of that name under this model in {self._path}",
                do="correct the build of the node, or add it to the model",
            )
        return named

    def differing(self, round: Round) -> tuple[str, ...]:
        """Return the names of the values of a round that contradict the file; key and share are not looked at."""
        return self._agreed.differing(round)

    def foreign(self, public_key: str, node_id: int, node_count: int) -> tuple[str, ...]:
        """Return the names of what makes a share one of no node of the network."""
        own = self._of_key.get(public_key, [])
        if self.nodes and not own:
            return ("public_key",)
        if node_count != ((own[0].node_count if own else None) or self.round.node_count):
            return ("node_count",)
        return () if not own or any(node.node_id == node_id for node in own) else ("node_id",)

    def calibrations(self, model: ModelPins) -> Iterator[Path]:
        """Iterate over the calibration files of a model, each after its hash was compared.

        Raises:
            DataError: A file cannot be read, or is another one than was pinned.
        """
        for pinned in model.calibrations:
            path = self._path.parent / pinned.file
            found = sha256_of(path)
            if found != pinned.sha256:
                raise DataError(
                    f"{path} has the SHA-256 {found[:12]}…",
                    wanted=f"{pinned.sha256[:12]}…, the file that {self._path} pins",
                    do="fetch the file that the network agreed on, or agree on this one and pin it",
                )
            yield path


def _refuse_doubles(what: str, values: list[tuple[Any, ...]]) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise UsageError(
                f"{what} {value[0]!r:.80} with {value[1]}, {times} times",
                wanted=f"every {what} once",
                do="remove the others",
            )
