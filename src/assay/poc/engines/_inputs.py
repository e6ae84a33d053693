"""The inputs of every engine: noise embeddings from the streams of a round.

Legend of shapes: B nonces, T positions, D hidden size.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from assay import streams
from assay.poc.protocol import Round


def noise_inputs(
    backend: streams.Backend, round: Round, nonces: Sequence[int], *, seq_len: int, hidden_size: int, dtype: str
) -> Float[Tensor, "B T D"]:
    """Return the input embeddings [B, T, D] of B nonces, N(0, 1) in the given dtype, on the device of the backend."""
    seeds_BS = streams.seeds(round.texts("inputs", nonces), round.strength)
    values = backend.normals(seeds_BS, seq_len * hidden_size, dtype)
    return streams.as_tensor(values).view(len(nonces), seq_len, hidden_size)
