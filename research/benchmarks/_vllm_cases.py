"""The cases of ``vllm_parallel.py``: what runs on two and four devices, alone and in groups that are named."""

from dataclasses import dataclass, field
from typing import Any

STORED = ("tensor", "channel-tensors", "block", "int8", "packed", "packed-zeros", "awq", "gptq")
STORED_EXPERTS = ("tensor", "block", "int8", "packed")
STAGES, TENSOR = {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}
FOUR_WORKERS = {"tensor_parallel_size": 4}
ON_NODES = TENSOR | {"distributed_executor_backend": "ray", "disable_custom_all_reduce": True}


@dataclass(frozen=True)
class Case:
    """What one case runs.

    Args:
        options: Engine arguments of vLLM.
        engines: Number of engines at once, each on a device of its own with its share of the nonces.
        weights: What the engine serves: the checkpoint, or a cheaper one under its name.
        law: Case whose pinned law judges this one; its own where empty.
        mixture: Whether the checkpoint is a small mixture of experts.
        stored: Format in which the checkpoint is stored, of ``tests.models.storing``; not quantised where empty.
        compiled: Whether layers are compiled, as in a server with default settings.
        validator: Whether the case judges the proofs of the others, without an engine of vLLM.
        ray: Whether the workers are on two nodes of Ray.
    """

    options: dict[str, Any] = field(default_factory=dict)
    engines: int = 1
    weights: str = "honest"
    law: str = ""
    mixture: bool = False
    stored: str = ""
    compiled: bool = False
    validator: bool = False
    ray: bool = False

    @property
    def checkpoint(self) -> str:
        """Name of the folder of the honest checkpoint."""
        kind = "mixture" if self.mixture else "honest"
        return f"{kind}-{self.stored}" if self.stored else kind

    @property
    def devices(self) -> int:
        """Number of devices of one engine."""
        return self.options.get("tensor_parallel_size", 1) * self.options.get("pipeline_parallel_size", 1)

    @property
    def steps_together(self) -> bool:
        """Whether data-parallel engines wait for each other in every step."""
        return self.mixture and self.options.get("data_parallel_size", 1) > 1


SHARED = TENSOR | {"enable_expert_parallel": True}
CASES = {
    "one": Case(),
    "tp2": Case(TENSOR),
    "pp2": Case(STAGES),
    "dp2": Case(engines=2, law="one"),
    "tp2-int4": Case(TENSOR, weights="int4", law="tp2"),
    "tp2-stale": Case(TENSOR, weights="stale", law="tp2"),
    "pp2-int4": Case(STAGES, weights="int4", law="pp2"),
    "dp2-int4": Case(engines=2, weights="int4", law="one"),
    "one-stale": Case(weights="stale", law="one"),
    "pins": Case(validator=True),
    "dp2 inside one engine": Case({"data_parallel_size": 2}, law="one"),
    "mixture": Case(mixture=True),
    "mixture-tp2": Case(TENSOR, mixture=True),
    "mixture-ep2": Case(SHARED, mixture=True),
    "mixture-dp2": Case({"data_parallel_size": 2}, mixture=True),
    "tp2-compiled": Case(TENSOR, compiled=True),
    "tp2-ray": Case(ON_NODES, ray=True),
    "tp4": Case(FOUR_WORKERS),
    "tp4-int4": Case(FOUR_WORKERS, weights="int4", law="tp4"),
    "tp2-pp2": Case(TENSOR | STAGES),
}
OF_FORMATS = {
    "formats-tp2": {f"tp2, {form}": Case(TENSOR, stored=form) for form in STORED},
    "formats-pp2": {f"pp2, {form}": Case(STAGES, stored=form) for form in STORED},
    "experts-tp2": {f"mixture-tp2, {form}": Case(TENSOR, mixture=True, stored=form) for form in STORED_EXPERTS},
    "experts-ep2": {f"mixture-ep2, {form}": Case(SHARED, mixture=True, stored=form) for form in STORED_EXPERTS},
}
GROUPS = {"four": [name for name, case in CASES.items() if case.devices > 2]}
GROUPS |= {"dense": [name for name, case in CASES.items() if not case.mixture and not case.ray and case.devices <= 2]}
GROUPS |= {"experts": [name for name, case in CASES.items() if case.mixture]}
GROUPS |= {group: list(cases) for group, cases in OF_FORMATS.items()}
CASES |= {name: case for cases in OF_FORMATS.values() for name, case in cases.items()}
