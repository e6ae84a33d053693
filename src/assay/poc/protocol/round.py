"""A round, its inputs (a round and a nonce), and the seed text of every stream of them.

The published texts are consensus. They have no length prefix and no version tag, because that is
what the network runs (``("a_b", "c")`` and ``("a", "b_c")`` collide by construction). A preset with
versioned texts writes a version tag and then every field after its length, so that no two streams
share a text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from assay.errors import UsageError
from assay.poc.protocol.checks import MAX_NONCE, check_name, check_number, join_prefixed
from assay.poc.protocol.pipelines import Pipeline, Positions, find_pipeline, get_pipeline

MAX_COUNT = 2**24  # most nonces of one proof
MAX_SEQ_LEN = 2**20

NONCE_TEXTS = {
    "inputs": "{block}_{key}_nonce{nonce}",  # no underscore before the number: published so
    "permutation": "{block}_{key}_nonce_{nonce}_permutations",
    "signs": "{block}_{key}_nonce_{nonce}_signs",
    "reflection": "{block}_{key}_nonce_{nonce}_hidden_r{index}",
    "pick": "{block}_{key}_nonce_{nonce}_pick_{k}",
    "first_pick": "{block}_{key}_nonce_{nonce}_pick_{k}_decode{index}",  # of step 0 of a chain
    "route": "{block}_n{nonce}_route_layer_{index}",  # of a layer with experts; without the key
    "rotation": "{block}_{key}_nonce_{nonce}_haar_hh_{k}_{index}",
    # In no published preset: for experiments that read positions with published texts.
    "weights": "{block}_{key}_nonce_{nonce}_weights",
    "projection": "{block}_{key}_nonce_{nonce}_projection_{k}",
}
BLOCK_TEXTS = {
    "layer_reflection": "{block}_layer_{index}_householder",
    "layer_signs": "{block}_layer_{index}_signs",
    "random_head": "{block}_lm_head",
    "target": "{block}_target",
}
VERSION = "assay.poc/2"


class Input(NamedTuple):
    """One nonce of one round: all that an engine needs to draw what the model reads."""

    round: "Round"
    nonce: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of one node.

    Args:
        block_hash: Block that seeds everything.
        public_key: Key of the node that is paid.
        block_height: Height of the block; recorded in the proof, not part of any seed.
        node_id: Number of this node, from 0 or from 1: it has the nonces that are equal to it
            modulo ``node_count``, from ``node_id`` on.
        node_count: Number of machines of one key among which the nonces are dealt out.
        model: Reference of the model; filled in by :func:`assay.poc.prove` when empty.
        preset: Name of a row of :data:`assay.poc.PIPELINES`.
        seq_len: Number of input positions of a nonce.
        r_target: Distance strictly below which a nonce is valid, in ``(0, 2]``.
        strength: Bits of the seed of each input, 32 (published) or 256. A preset with versioned
            texts always has 256, and one that publishes points 32.

    Raises:
        UsageError: A value is out of range.

    Example:
        >>> round = Round(block_hash="block_alpha", public_key="node_A", node_id=1, node_count=4)
        >>> list(round.nonces(0, 3))
        [1, 5, 9]
        >>> round.text("inputs", 5)
        'block_alpha_node_A_nonce5'
    """

    block_hash: str
    public_key: str
    block_height: int = 0
    node_id: int = 0
    node_count: int = 1
    model: str = ""
    preset: str = "poc-2.0"
    seq_len: int = 256
    r_target: int | float = 1.416  # written as it was given
    strength: Literal[32, 256] = 32

    def __post_init__(self) -> None:
        for name in ("block_hash", "public_key"):
            check_name(
                name,
                getattr(self, name),
                do=f"pass the {name.replace('_', ' ')} as the chain prints it",
            )
        if not isinstance(self.model, str) or not self.model.isprintable():
            raise UsageError(
                f"model is {self.model!r:.80}",
                wanted="a reference of printable characters",
                do="pass it as text",
            )
        for name, low, high in (
            ("block_height", 0, MAX_NONCE),
            ("node_count", 1, MAX_NONCE),
            # Networks that number nodes from 1 have a node 3 of 3, and after one left, a 3 of 2.
            ("node_id", 0, MAX_NONCE),
            ("seq_len", self._fewest_positions, MAX_SEQ_LEN),
        ):
            check_number(name, getattr(self, name), low, high)
        number = isinstance(self.r_target, (int, float)) and not isinstance(self.r_target, bool)
        if not number or not 0 < self.r_target <= 2:
            raise UsageError(
                f"r_target is {self.r_target!r}",
                wanted="a distance in (0, 2]: chord distances on the unit sphere end at 2",
                do="`assay poc calibrate --valid-rate 0.5` gives the r_target of a wanted valid "
                "rate",
                field="r_target",
            )
        if self.strength not in (32, 256) or not isinstance(self.strength, int):
            raise UsageError(
                f"strength is {self.strength!r}",
                wanted="32 or 256",
                do="use 32, the published seeds",
            )
        if self.versioned:
            object.__setattr__(self, "strength", 256)
        elif (pipeline := self._pipeline) is not None and pipeline.output == "points":
            # The network has no others in this scheme.
            object.__setattr__(self, "strength", 32)

    @property
    def _pipeline(self) -> Pipeline | None:
        return find_pipeline(self.preset) if isinstance(self.preset, str) else None

    @property
    def _fewest_positions(self) -> int:
        read = pipeline.read if (pipeline := self._pipeline) is not None else None
        return read.fewest if isinstance(read, Positions) else 1

    @property
    def versioned(self) -> bool:
        """Whether the preset has versioned seed texts; an unknown preset has published ones."""
        return (pipeline := self._pipeline) is not None and pipeline.texts == "versioned"

    @property
    def plain(self) -> "Round":
        """The round without model and height, which change no number and differ between nodes."""
        return replace(self, model="", block_height=0, preset=get_pipeline(self.preset).name)

    @property
    def share(self) -> int:
        """Residue of the nonces of this node modulo ``node_count``."""
        return self.node_id % self.node_count

    def text(self, stream: str, nonce: int, *, index: int = 0, k: int = 0) -> str:
        """Return the seed text of a stream of one nonce.

        A published text is that of a key of :data:`NONCE_TEXTS`. A versioned one has tag, stream,
        block, key, nonce, index and k, each as its length in bytes, a colon, and itself.
        """
        return self.texts(stream, [nonce], count=index + 1, k=k)[-1]

    def texts(self, stream: str, nonces: Iterable[int], *, count: int = 1, k: int = 0) -> list[str]:
        """Return seed texts of a stream for many nonces, each with index 0 to ``count - 1``.

        The common part of a batch is written once, which takes a tenth of the time of :meth:`text`
        for each nonce.
        """
        if self.versioned:
            head = join_prefixed(VERSION, stream, self.block_hash, self.public_key)
            numbers: Iterable[object] = map(join_prefixed, nonces)
            tails = [join_prefixed(index, k) for index in range(count)]
        else:
            before, _, after = NONCE_TEXTS[stream].partition("{nonce}")
            head = before.format(block=self.block_hash, key=self.public_key)
            numbers = nonces
            tails = [after.format(index=index, k=k) for index in range(count)]
        return [f"{head}{number}{tail}" for number in numbers for tail in tails]

    def block_text(self, stream: str, index: int = 0) -> str:
        """Return the seed text of a block's stream: of :data:`BLOCK_TEXTS`, or versioned."""
        if self.versioned:
            return join_prefixed(VERSION, stream, self.block_hash, index)
        return BLOCK_TEXTS[stream].format(block=self.block_hash, index=index)

    def nonces(self, start: int, stop: int) -> range:
        """Return the nonces at positions ``[start, stop)`` of this node's own sequence.

        Position ``i`` is nonce ``node_id + i * node_count``.
        """
        if not 0 <= start < stop or stop - start > MAX_COUNT:
            raise UsageError(
                f"nonce positions {start}:{stop}",
                wanted=f"0 <= first < end, and at most {MAX_COUNT} in one proof",
                do="give a range such as --nonces 0:256",
            )
        chosen = range(
            self.node_id + start * self.node_count,
            self.node_id + stop * self.node_count,
            self.node_count,
        )
        self.check_nonces(chosen)
        return chosen

    def inputs(self, nonces: Sequence[int]) -> Sequence[Input]:
        """Return the inputs of nonces for :meth:`assay.poc.Engine.run`.

        Example:
            >>> Round(block_hash="block_alpha", public_key="node_A").inputs(range(8))[3].nonce
            3
        """
        return RoundInputs(self, nonces)

    def check_nonces(self, nonces: Iterable[int]) -> Sequence[int]:
        """Return nonces of any kind, a generator or a numpy array too, as a range or a list.

        Raises:
            UsageError: The nonces are empty or too many, or one is out of range, belongs to another
                node, or does not ascend; names the first one.
        """
        # One too many is enough to refuse, of an endless generator too.
        most = MAX_COUNT + 1
        if isinstance(nonces, range):
            chosen: Sequence[int] = nonces[:most]
        else:
            bounded: Iterable[Any] = islice(nonces, most) if isinstance(nonces, Iterable) else ()
            chosen = [int(nonce) if isinstance(nonce, np.integer) else nonce for nonce in bounded]
        if not 0 < len(chosen) < most:
            seen = f"more than {MAX_COUNT} nonces" if chosen else f"no nonces in {nonces!r:.60}"
            raise UsageError(
                seen,
                wanted=f"1 to {MAX_COUNT} in one proof",
                do="give a range, such as --nonces 0:256 or range(256)",
            )
        regular = (
            isinstance(chosen, range) and chosen.step > 0 and chosen.step % self.node_count == 0
        )
        last = -1
        share = self.share
        # The ends of a range decide for all.
        for nonce in sorted({chosen[0], chosen[-1]}) if regular else chosen:
            check_number("nonce", nonce, 0, MAX_NONCE)
            if nonce % self.node_count != share:
                raise UsageError(
                    f"nonce {nonce} on node {self.node_id} of {self.node_count}",
                    wanted=f"nonces that are {share} modulo {self.node_count}",
                    do="take them from Round.nonces(start, stop)",
                )
            if nonce <= last:
                raise UsageError(
                    f"nonce {nonce} after {last}",
                    wanted="ascending nonces, each once",
                    do="sort them",
                )
            last = nonce
        return chosen

    def with_model(self, reference: str) -> "Round":
        """Return the round with its model named, if it was not."""
        return self if self.model else replace(self, model=reference)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the proof header."""
        return asdict(self)


@dataclass(frozen=True)
class RoundInputs(Sequence[Input]):
    """The inputs of many nonces of one round, each made when it is read.

    The nonces may be a range that never ends in practice, such as the share of a node.
    """

    round: Round
    nonces: Sequence[int]

    def __len__(self) -> int:
        return len(self.nonces)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return RoundInputs(self.round, self.nonces[place])
        return Input(self.round, self.nonces[place])


def seed_texts(inputs: Iterable[Input], stream: str, *, count: int = 1, k: int = 0) -> list[str]:
    """Return the seed texts of a stream for inputs of any rounds, as :meth:`Round.texts` does."""
    texts: list[str] = []
    # Equal rounds that stand together are written at once, which is most of the time saved.
    for round, run in groupby(inputs, key=itemgetter(0)):
        texts += round.texts(stream, [nonce for _, nonce in run], count=count, k=k)
    return texts


def group_inputs(inputs: Sequence[Input]) -> list[list[int]]:
    """Group inputs that one engine may run together; return the places of each group, in order.

    Inputs share a batch if they agree in preset, length and seed bits. What a preset draws for the
    block (target, random head, steps between layers) is drawn once for a batch, so inputs of
    several blocks share one only where the preset draws nothing for the block. No engine lets a row
    depend on the others of its batch, so each input has the bits that it has in its own round.

    Example:
        >>> first, second = (
        ...     Round(block_hash="b", public_key=key, preset="artifact") for key in "xy"
        ... )
        >>> group_inputs([Input(first, 3), Input(second, 7)])
        [[0, 1]]
    """
    groups: dict[Any, list[int]] = {}
    for place, (round, _) in enumerate(inputs):
        block = round.block_hash if get_pipeline(round.preset).draws_for_block else None
        groups.setdefault((round.preset, round.seq_len, round.strength, block), []).append(place)
    return list(groups.values())
