"""What was run inside vLLM: versions, formats, caches, architectures and executors."""

from collections.abc import Mapping

from assay.poc.protocol.pins import CACHES

TESTED = "0.32"
"""The minor version on which the tests have run."""

BFLOAT16 = ("bfloat16",)
WITH_FLOAT16 = ("bfloat16", "float16")
WITH_FLOAT32 = ("bfloat16", "float32")

_HYBRID = (
    "FalconH1ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "Lfm2ForCausalLM",
    "NemotronHForCausalLM",
)

SHARED_EXPERTS = ("cuda",)
"""Kinds of device on which mixtures were run whose experts are quantised, and whose data-parallel
engines wait for each other's experts in every step."""

WITHOUT_AVX512 = ("x86_64 AVX2", "x86_64 DEFAULT")
"""Processors for which vLLM's CPU build has neither products of four bits nor a cache in eight. Its
products of int8 are so slow there that a batch of eight short nonces did not end in two minutes."""

LOADED = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""Formats in which vLLM loads the files that a digest covers; in the others it reads other files,
or none.
"""

EXECUTORS = (None, "mp", "uni", "ray")
"""Ways in which vLLM runs its workers that were run with nonces. The direct path relies on calls
into a worker that run between two of its steps, in the thread of these."""

EIGHT_BITS = dict.fromkeys(("fp8", "fp8_e4m3"), CACHES[0])
"""Caches of keys and values that are builds with a law of their own, by what ``--kv-cache-dtype``
says.

The other format of eight bits, ``fp8_e5m2``, has a bit less: its honest noise came to 0.6 of the
distance of four bits.
"""

Tested = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By kind of device, what was run there, with the dtypes in which it was; no dtypes are all of
them.
"""

STORED: Tested = {
    "cpu": {"int8-rows": WITH_FLOAT32, "int4-groups": WITH_FLOAT16},
    "cuda": {
        **dict.fromkeys(("float8", "float8-block", "int8-rows"), BFLOAT16),
        "int4-groups": WITH_FLOAT16,
    },
}
"""Formats in which a checkpoint may be stored.

On a CPU vLLM multiplies four bits in no other dtype. Its products in float8 by blocks need a CPU
with AMX and leave the inputs as they are, which is another computation than that of the
transformers engine.
"""

WITH_STATE: Tested = {
    "cpu": {**dict.fromkeys(_HYBRID, WITH_FLOAT32), "Qwen3NextForCausalLM": BFLOAT16},
    "cuda": dict.fromkeys((*_HYBRID, "Qwen3NextForCausalLM"), BFLOAT16),
}
"""Architectures with layers that keep a state.

On a CPU vLLM has no kernel for prompts of the first Mamba (Jamba), and its linear attention takes
bfloat16 only: where either is missing, the first request ends the engine.
"""

EIGHT_BIT_CACHES: Tested = {"cpu": {"fp8": ()}, "cuda": {"fp8": ()}}
"""Caches in eight bits, with layers of attention alone."""
