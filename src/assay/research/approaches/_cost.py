"""What an approach costs by its description alone: random numbers to hold, and where they can be made.

Bytes are counted as random numbers are drawn: a normal takes 4, an index 8, a sign 1. What acts between the layers is
counted as it is held there, 4 bytes a number.
"""

from dataclasses import dataclass

from assay.poc.protocol import RANDOM_HEAD_ROWS, Pipeline, Step

__all__ = ["PIPELINE_PARALLEL", "Memory", "memory", "tensor_parallel"]

PIPELINE_PARALLEL = True
"""Every approach of the table can run on the stages of pipeline parallelism, each stage alone.

What follows the last layer is on the last stage, and what acts between the layers is drawn from the block, so every
stage makes its own. An approach that read states of several stages would be the first that cannot.
"""


@dataclass(frozen=True)
class Memory:
    """Bytes of random numbers.

    Args:
        per_nonce: drawn for every nonce of a batch; the inputs, which all approaches share, are not counted.
        per_block: drawn once per block: random head, target, and what acts between the layers.
    """

    per_nonce: int
    per_block: int


def memory(pipeline: Pipeline, *, hidden_size: int, vocab_size: int, num_layers: int, seq_len: int) -> Memory:
    """Return the bytes of random numbers that an approach holds for a model of these sizes."""
    size = hidden_size
    per_nonce = 0 if pipeline.read == "last" else seq_len  # the signs of the positions
    for step in pipeline.hidden:
        per_nonce += _bytes(step, size)
        size = step.count if step.name in ("pick", "project") else size
    output = pipeline.output_size(hidden_size, vocab_size)
    per_nonce += sum(_bytes(step, output) for step in pipeline.logits)
    between = 0 if pipeline.layers == "none" else num_layers * hidden_size * 4
    head = RANDOM_HEAD_ROWS * hidden_size * 4 if pipeline.head == "random" else 0
    target = output * 4 if pipeline.output == "distance" else 0
    return Memory(per_nonce, between + head + target)


def _bytes(step: Step, size: int) -> int:
    match step.name:
        case "unit":
            return 0
        case "signs":
            return size
        case "permute":
            return 8 * size
        case "pick":
            return 8 * step.count
        case "reflect" | "rotate" | "project":
            return 4 * step.count * size


def tensor_parallel(pipeline: Pipeline) -> bool:
    """Whether every rank of tensor parallelism can do its part alone.

    Hidden states are whole on every rank. The logits of the trained head are not: each rank has a slice of the
    vocabulary, and a permutation, a reflection or the norm needs all of it.
    """
    return pipeline.head != "trained"
