"""Allowed senders and their noise laws, from the pins and the file of nodes."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unicodedata import normalize
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from assay.errors import DataError, UsageError
from assay.files.names import normal_form
from assay.files.toml import read_toml
from assay.poc.net.callback_urls import check_url
from assay.poc.net.server_settings import ServerSettings, check_secrets
from assay.poc.net.signatures import Signatures
from assay.poc.protocol.pins import Build
from assay.poc.protocol.pins_file import NetworkPins, NodePins
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.verdict.calibration_file import account_alpha
from assay.poc.verdict.entries import sha256

if TYPE_CHECKING:
    from assay.models.catalogue import ModelInfo
    from assay.poc.net.deployment import Deployment

Secrets = Annotated[tuple[str, ...], Field(min_length=1)]
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


class NodeEntry(BaseModel):
    """A table ``[[nodes]]`` of the nodes file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    public_key: Annotated[str, AfterValidator(normal_form)]
    secrets: Secrets | None = (
        None  # of its callbacks, as Standard Webhooks has them; ``--callback-secret`` when None
    )
    relay: str | None = None  # name of a trusted relay that signs for several nodes with one secret
    build: Annotated[str, AfterValidator(normal_form)] | None = (
        None  # needed where the model has several builds and the pins do not say which
    )
    url: str | None = None  # address of its service, for a node that is polled
    read_key: str | None = None  # key that may read there


class _NodesFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: tuple[NodeEntry, ...]


@dataclass(frozen=True)
class Sender:
    """A node as the validator knows it."""

    entry: NodeEntry  # what the nodes file says of it
    signatures: Signatures  # check of its callbacks; empty where none is needed
    build: Build  # build on which it computes
    node_count: int  # number of machines of the key
    machines: frozenset[int] | None  # numbers of the machines that may send; all when None

    @property
    def public_key(self) -> str:
        """Key of the node."""
        return self.entry.public_key

    @property
    def is_proven(self) -> bool:
        """Whether polled data is authentic: over http anyone on the path may have written it."""
        return urlsplit(self.entry.url or "").scheme == "https"

    def has(self, node_id: object) -> bool:
        """Return whether a value is the number of a machine of this key that may send."""
        # Where no machine is listed, numbers begin at 0: n of n would be 0 of n a second time.
        listed = range(self.node_count) if self.machines is None else self.machines
        return type(node_id) is int and node_id in listed


class Registry:
    """The pins of one model with the nodes that may send.

    Raises:
        UsageError: The pins do not have that model, or neither file lists a node; a node has an
            unknown build, or one secret would speak for several nodes.
        Refusal: An address that may not be polled.
    """

    def __init__(
        self,
        network: NetworkPins,
        model: str | None,
        entries: Sequence[NodeEntry],
        settings: ServerSettings,
    ) -> None:
        self.network, self.alpha = network, account_alpha(network, settings.alpha)
        self.model = network.model(model if len(network.models) > 1 else None)
        self.pipeline: Pipeline = get_pipeline(network.round.preset)
        shared = Signatures(settings.callback_secrets)
        self._pinned = defaultdict[str, list[NodePins]](list)
        for node in network.nodes:
            self._pinned[node.public_key].append(node)
        entries_of_nodes = {key: NodeEntry(public_key=key) for key in self._pinned}
        entries_of_nodes |= {entry.public_key: entry for entry in entries}
        _check_names(entries_of_nodes)
        _check_owners(entries_of_nodes.values(), settings.callback_secrets)
        self.senders = {
            key: self._sender(entry, shared, settings) for key, entry in entries_of_nodes.items()
        }
        """Nodes that may send, by key."""
        agreed = network.round.model_dump_json(include={"preset", "seq_len", "strength"})
        agreed += self.model.model_dump_json(include={"digest", "weights", "frame"})
        self.computed = {
            build: sha256(agreed + build.model_dump_json()) for build in self.model.builds
        }
        """Hashes of what the nodes of a build compute, which their callbacks do not state."""
        if not self.senders:
            raise UsageError(
                "pins and nodes files that list no node",
                wanted="the keys of the nodes that may send",
                do="add them under [[nodes]] of the pins file, or of the file of --nodes",
            )

    @classmethod
    def load(
        cls, pins: Path, nodes: Path | None, settings: ServerSettings, *, model: str | None = None
    ) -> "Registry":
        """Read both files, of which errors name the key."""
        return cls(
            NetworkPins.load(pins),
            model,
            _entries(nodes) if nodes else (),
            settings,
        )

    def check_length(self, model: "ModelInfo | Deployment") -> None:
        """Refuse pins whose rounds are longer than a model; its facts are enough, without its
        weights.
        """
        seq_len = self.network.round.seq_len
        steps = self.pipeline.steps
        if seq_len + steps > model.max_positions:
            raise UsageError(
                f"seq_len {seq_len}{f' and {steps} steps' if steps else ''} with {model.reference}",
                wanted=f"at most its {model.max_positions} positions",
                do="correct seq_len in the file of --pins",
            )

    def _sender(self, entry: NodeEntry, shared: Signatures, settings: ServerSettings) -> Sender:
        check_url(entry.url, allow_private=settings.allow_private_callbacks)
        if entry.url is not None and self.pipeline.output != "distance":
            raise UsageError(
                f"the url {entry.url!r:.80} with preset {self.pipeline.name}",
                wanted="nodes that are polled only where they publish distances: /status does not "
                "hold vectors",
                do="leave the url out, and let the node send callbacks",
            )
        pinned = self._pinned.get(entry.public_key)
        return Sender(
            entry=entry,
            signatures=shared if entry.secrets is None else Signatures(entry.secrets),
            build=self._build(
                entry.public_key, {node.build for node in pinned or ()} | {entry.build}
            ),
            node_count=(pinned[0].node_count if pinned else None) or self.network.round.node_count,
            machines=frozenset(node.node_id for node in pinned) if pinned else None,
        )

    def _build(self, public_key: str, stated: set[str | None]) -> Build:
        """Return the build of a node: the one that either file names, or the only one of the
        model.
        """
        names = sorted(stated - {None}, key=str)
        matching = [build for build in self.model.builds if not names or build.name == names[0]]
        if len(names) > 1 or len(matching) != 1:
            raise UsageError(
                (
                    f"build {', '.join(map(str, names)) or None!r:.80} of the node "
                    f"{public_key!r:.60}"
                ),
                wanted=(
                    "one of "
                    + ", ".join(repr(build.name) for build in self.model.builds)
                    + " for all its machines"
                ),
                do="name the node's build in the pins, and give machines of another build a key of "
                "their own",
            )
        return matching[0]


def _check_names(keys: Iterable[str]) -> None:
    """Refuse keys that look alike: those of one normal form (NFKC) of Unicode once what is not
    drawn is left out.
    """
    key_by_form: dict[str, str] = {}
    for key in keys:
        if (
            first_key := key_by_form.setdefault(normalize("NFKC", _UNSEEN.sub("", key)), key)
        ) != key:
            raise UsageError(
                f"the keys {first_key!a:.80} and {key!a:.80}",
                wanted="keys that can be told apart",
                do="write both in the normal form NFKC, or remove one of the two",
            )


def _check_owners(entries: Iterable[NodeEntry], shared: Sequence[str]) -> None:
    """Refuse a secret of several nodes, in whatever spelling: each could sign what convicts the
    others for life.

    A relay that is trusted with several nodes is named by each of them.
    """
    owners: dict[bytes, NodeEntry] = {}
    for entry in entries:
        for secret in check_secrets(shared if entry.secrets is None else entry.secrets):
            owner = owners.setdefault(secret, entry)
            if owner is not entry and (entry.relay is None or entry.relay != owner.relay):
                raise UsageError(
                    (
                        f"one secret of the nodes {owner.public_key!r:.60} and "
                        f"{entry.public_key!r:.60}"
                    ),
                    wanted="a secret of its own for every node: who has it can sign for each of "
                    "them",
                    do="write secrets for each in the file of --nodes, or the relay that signs for "
                    "both",
                )


def _entries(path: Path) -> tuple[NodeEntry, ...]:
    try:
        entries = _NodesFile.model_validate(read_toml(path)).nodes
    except ValidationError as error:
        # The input may be a secret.
        fault: Any = error.errors(include_url=False, include_input=False)[0]
        raise DataError(
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']:.200}",
            wanted="tables [[nodes]]",
            do="see docs/validator.md",
        ) from None
    for key, count in Counter(entry.public_key for entry in entries).items():
        if count > 1:
            raise DataError(
                f"{path}: the key {key!r:.80} twice",
                wanted="every key once",
                do="remove one of the two",
            )
    return entries
