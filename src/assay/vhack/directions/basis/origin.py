"""What a basis was made from: model, pairs and settings, with their digests."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from assay.vhack.directions.gradients.targets import Coverage

if TYPE_CHECKING:
    pass

ORIGIN_SETTINGS = ("dtype", "rank", "factors", "top_k", "tau_axis", "method")


@dataclass(frozen=True)
class Origin:
    """Model, pairs and settings of a basis.

    Attributes:
        model: Reference that the model was loaded from, for people to read.
        weights: SHA-256 in hex of the weights, from :func:`assay.vhack.weights_digest`; empty
            without a model.
        dtype: Dtype of the model, for example ``"bfloat16"``.
        rank: Number of singular directions kept per weight matrix; None stands for all of them.
        factors: Dtype of the factors U and Vh that the gradients were projected with.
        top_k: Number of axes per module that was asked for.
        tau_axis: Share of the first singular value below which axes were set to zero.
        method: Name of the method: ``"lda"`` or ``"svd"``.
        pairs: Keys of the pairs that were used, in order.
        groups: Groups of these pairs, in the same order.
        skipped: Keys of the pairs that were left out because their sides do not differ.
        captured: Share of the gradient's energy ‖g‖² that ``rank`` directions hold; 1 for all, and
            where factors were given truncated, from which it cannot be measured.
        coverage: Share of the model's weights that the modules of the basis are, and the matrices
            left out.
        tokens: Number of tokens of the pairs that came to each expert, by the name of the module
            that holds them.
        chat_template: SHA-256 of the chat template that rendered the pairs; empty where they were
            texts.
    """

    model: str = ""
    weights: str = ""
    dtype: str = ""
    rank: int | None = None
    factors: str = ""
    top_k: int = 12
    tau_axis: float = 0.0
    method: str = "lda"
    pairs: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    captured: float = 1.0
    coverage: Coverage = field(default_factory=Coverage)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    chat_template: str = ""

    @property
    def given(self) -> tuple[str, ...]:
        """Keys of all pairs it was to be made from, used or skipped, sorted."""
        return tuple(sorted(self.pairs + self.skipped))

    @property
    def pairs_digest(self) -> str:
        """SHA-256 in hex of the pairs that were given, whatever their order."""
        return hashlib.sha256("\n".join(self.given).encode()).hexdigest()

    @property
    def settings_digest(self) -> str:
        """SHA-256 in hex of the settings: dtype, rank, factors, top_k, tau_axis and method."""
        return hashlib.sha256(
            json.dumps({name: getattr(self, name) for name in ORIGIN_SETTINGS}).encode()
        ).hexdigest()
