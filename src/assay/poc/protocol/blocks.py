"""What a block fixes for all of its nonces: the random head, folded onto the target.

The cosine of a nonce with the target t is t·Wx/‖Wx‖ = v·x/‖Wx‖, with v = Wᵀt and W the random head.
W has far more rows than columns, so ‖Wx‖ is all but ‖x‖·√V, and whatever moves a distance moves it
along v. Head and target are drawn for the block, so v is the same for every nonce and every node of
it. Honest noise δ of a state moves a distance by v·δ: it is proportional to the length of v, which
differs between blocks by 1/√(2D). The states themselves have most of their energy in few
coordinates, where signs leave it and reflections leave most of it. So the spread of a block's
distances follows the length of v *under that energy*, and differs more
(:class:`assay.stats.BlockLaw`).

Legend of shapes: N nonces, D hidden size, V rows of the random head.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import scipy

from assay import streams
from assay.errors import UsageError
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.round import Round
from assay.stats.chord import RANDOM_HEAD_ROWS, BlockLaw
from assay.streams.arrays import as_tensor

FloatArray = npt.NDArray[np.float64]

MAX_HIDDEN_SIZE = 2**16
_ROWS_AT_ONCE = 256  # of the head in float64


def folded_head(round: Round, hidden_size: int) -> FloatArray:
    """Return v = Wᵀt of a block [D], for a standard normal head W and target t.

    Raises:
        UsageError: The hidden size is not in [1, 65536].
    """
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise UsageError(
            f"hidden size {hidden_size}",
            wanted=f"a whole number in [1, {MAX_HIDDEN_SIZE}]",
            do="pass the model's own",
        )
    # The texts of head and target hold the block and nothing else of a round: nodes of a block
    # share the work.
    return _folded(
        Round(block_hash=round.block_hash, public_key="-", preset=round.preset), hidden_size
    ).copy()


def block_scale(round: Round, hidden_size: int) -> float:
    """Return the length of a block's folded head over its mean; 1.0 without a random head.

    The mean over blocks is one and the standard deviation 1/√(2D). Honest noise of the distances of
    a block is proportional to it. Only block and preset of the round matter.

    Raises:
        UsageError: The preset is unknown, or the size of the state is not in [1, 65536].

    Example:
        >>> from assay.poc import Round
        >>> round = Round(block_hash="block_alpha", public_key="node_A")
        >>> f"{block_scale(round, 256):.4f}"
        '1.0048'
    """
    if get_pipeline(round.preset).head != "random":
        return 1.0
    length = float(np.linalg.norm(folded_head(round, hidden_size)))
    log_mean = scipy.special.gammaln((hidden_size + 1) / 2) - scipy.special.gammaln(hidden_size / 2)
    return length / (math.sqrt(2) * math.exp(float(log_mean)))


@dataclass(frozen=True, kw_only=True)
class BlockFactor:
    """How much wider the distances of a block are than the chord law.

    Args:
        value: Factor γ, the standard deviation of the block's cosines over that of the law.
        error: Standard error of the factor, from the number of states.
        effective_dimension: Effective dimension of the states in front of the head, which holds for
            every block.
        n: Number of states measured.
    """

    value: float
    error: float
    effective_dimension: float
    n: int

    @property
    def law(self) -> BlockLaw:
        """Law of the block's distances: γ has this value and this error."""
        freedom = (self.value / self.error) ** 2 / 2 if self.error else math.inf
        return BlockLaw(dimension=RANDOM_HEAD_ROWS, freedom=freedom, scale=self.value)


def block_factor(round: Round, states_ND: FloatArray) -> BlockFactor:
    """Predict the width of a block's distances from two or more states of the model.

    Signs drawn per nonce leave the share eᵢ of a state's energy in its coordinate. Reflections in
    random hyperplanes bring it to c·eᵢ + (1 − c)/D, with c = 1 − 4/D + 8/(D(D + 2)) for each of
    them. Then γ² is the mean of Σ vᵢ²eᵢ over the states.

    Raises:
        UsageError: The preset has no signs or no random head.
    """
    pipeline = get_pipeline(round.preset)
    if not has_block_factor(pipeline):
        raise UsageError(
            f"preset {round.preset}",
            wanted="one with signs and a random head: in others a block has a mean of its own",
            do="use --preset poc-2.0, or leave --model out",
        )
    n, size = states_ND.shape
    energy_ND = states_ND.astype(np.float64) ** 2
    energy_ND /= energy_ND.sum(axis=1, keepdims=True)
    reflections = sum(step.count for step in pipeline.hidden if step.name == "reflect")
    shrinkage = (1 - 4 / size + 8 / (size * (size + 2))) ** reflections
    energy_ND = shrinkage * energy_ND + (1 - shrinkage) / size
    squares_N = (energy_ND * folded_head(round, size) ** 2).sum(axis=1)
    value = math.sqrt(float(squares_N.mean()))
    error = float(squares_N.std(ddof=1)) / math.sqrt(n) / (2 * value)
    total_D = energy_ND.sum(axis=0)
    # The sum of products of the energies of two different states.
    products = float(total_D @ total_D - (energy_ND**2).sum())
    return BlockFactor(value=value, error=error, effective_dimension=n * (n - 1) / products, n=n)


def has_block_factor(pipeline: Pipeline) -> bool:
    """Return whether a block changes the width of a pipeline's distances and nothing else."""
    return pipeline.head == "random" and any(step.name == "signs" for step in pipeline.hidden)


@lru_cache(maxsize=256)
def _folded(block: Round, hidden_size: int) -> FloatArray:
    seeds = streams.seeds([block.block_text("random_head")])
    normals = streams.get_backend("auto", "cpu").normals(seeds, hidden_size * RANDOM_HEAD_ROWS)
    head_VD = as_tensor(normals).numpy().reshape(RANDOM_HEAD_ROWS, hidden_size)
    from assay.poc.protocol.transforms import block_target

    target_V = block_target(block, RANDOM_HEAD_ROWS).numpy().astype(np.float64)
    v_D = np.zeros(hidden_size)
    for start in range(0, RANDOM_HEAD_ROWS, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        v_D += target_V[rows] @ head_VD[rows].astype(np.float64)
    return v_D
