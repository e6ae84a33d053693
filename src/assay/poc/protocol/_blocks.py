"""What a block fixes for all of its nonces: the random head, folded onto the target.

The cosine of a nonce with the target t is t·Wx/‖Wx‖ = v·x/‖Wx‖, with v = Wᵀt and W the random head. W has far more rows
than columns, so ‖Wx‖ is all but ‖x‖·√V, and whatever moves a distance moves it along v. Head and target are drawn for
the block, so v is the same for every nonce and every node of it. Honest noise δ of a state moves a distance by v·δ: it
is proportional to the length of v, which differs between blocks by 1/√(2D).

Legend of shapes: D hidden size, V rows of the random head.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from assay import streams
from assay.errors import UsageError
from assay.poc.protocol._pipelines import get_pipeline
from assay.poc.protocol._round import Round
from assay.poc.protocol._transforms import block_target
from assay.stats import RANDOM_HEAD_ROWS

FloatArray = npt.NDArray[np.float64]

MAX_HIDDEN_SIZE = 2**16
_ROWS_AT_ONCE = 256  # of the head in float64


def folded_head(round: Round, hidden_size: int) -> FloatArray:
    """Return v = Wᵀt of a block [D], W standard normal and t the target; over blocks, v is N(0, I).

    Args:
        round: Round of a preset with a random head; only its block and preset matter.
        hidden_size: Number of columns D of the head.

    Raises:
        UsageError: The preset has no random head, or the size is not in [1, 65536].
    """
    if get_pipeline(round.preset).head != "random":
        raise UsageError(
            f"preset {round.preset}", wanted="one with a random head", do="use --preset poc-2.0 for the law of a block"
        )
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise UsageError(
            f"hidden size {hidden_size}", wanted=f"a whole number in [1, {MAX_HIDDEN_SIZE}]", do="pass the model's own"
        )
    # The texts of head and target hold the block and nothing else of a round: nodes of a block share the work.
    return _folded(Round(block_hash=round.block_hash, public_key="-", preset=round.preset), hidden_size).copy()


def block_scale(round: Round, hidden_size: int) -> float:
    """Return the length of a block's folded head over its mean, √2·Γ((D + 1)/2)/Γ(D/2); 1.0 without a random head.

    The mean over blocks is one and the standard deviation 1/√(2D). Honest noise of the distances of a block is
    proportional to it.

    Args:
        round: Round of any preset; only its block and preset matter.
        hidden_size: Size D of the state that the head is applied to.

    Raises:
        UsageError: The preset is unknown, or the size is not in [1, 65536].

    Example:
        >>> from assay.poc import Round
        >>> round = Round(block_hash="block_alpha", public_key="node_A")
        >>> f"{block_scale(round, 256):.4f}"
        '1.0048'
    """
    if get_pipeline(round.preset).head != "random":
        return 1.0
    length = float(np.linalg.norm(folded_head(round, hidden_size)))
    log_mean = special.gammaln((hidden_size + 1) / 2) - special.gammaln(hidden_size / 2)
    return length / (math.sqrt(2) * math.exp(float(log_mean)))


@lru_cache(maxsize=256)
def _folded(block: Round, hidden_size: int) -> FloatArray:
    seeds = streams.seeds([block.block_text("random_head")])
    normals = streams.get_backend("auto", "cpu").normals(seeds, hidden_size * RANDOM_HEAD_ROWS)
    head_VD = streams.as_tensor(normals).numpy().reshape(RANDOM_HEAD_ROWS, hidden_size)
    target_V = block_target(block, RANDOM_HEAD_ROWS).numpy().astype(np.float64)
    v_D = np.zeros(hidden_size)
    for start in range(0, RANDOM_HEAD_ROWS, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        v_D += target_V[rows] @ head_VD[rows].astype(np.float64)
    return v_D
