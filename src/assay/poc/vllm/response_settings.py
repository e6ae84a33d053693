"""Which processor an engine needs, and the settings of vLLM under which responses are not recorded or not seeded."""

from typing import Any, Literal

from assay.errors import UsageError

Mode = Literal["off", "sketched", "seeded"]
"""What is done for responses: nothing; receipts with sketches, while the engine samples; seeded sampling as well."""

EXTENSION = "assay.poc.vllm.ResponseExtension"
"""What ``--worker-extension-cls`` names for nonces and responses."""

PROCESSORS = {"v1": "assay.poc.vllm:ProcessorV1", "v2": "assay.poc.vllm:ProcessorV2"}
FIRST_V2 = (0, 31)
"""Version of vLLM from which the V2 runner has logits processors."""


def processor_for(config: Any) -> str:
    """Return the name of the logits processor for the model runner of an engine, as ``--logits-processors`` takes it.

    Args:
        config: vLLM's ``VllmConfig``.
    """
    return PROCESSORS["v2" if getattr(config, "use_v2_model_runner", False) else "v1"]


def check_responses(config: Any, mode: Mode, version: str) -> None:
    """Refuse an engine under which responses could not be recorded, or not be seeded.

    Args:
        config: vLLM's ``VllmConfig``, with or without the processor.
        mode: What is to be done for responses.
        version: Version of vLLM.

    Raises:
        UsageError: Names the first setting that stands in the way.
    """
    if mode == "off":
        return
    v2 = processor_for(config) == PROCESSORS["v2"]
    speculative = getattr(config, "speculative_config", None) is not None
    if speculative and not v2:
        raise UsageError(
            f"ASSAY_RESPONSES={mode} with speculative decoding on the V1 runner, which takes no logits processor then",
            wanted="the V2 runner, or no drafts",
            do="leave the speculative configuration out, or ASSAY_RESPONSES=off",
        )
    if mode != "seeded":
        return
    minor = tuple(int(part) for part in version.split(".")[:2])
    if v2 and minor < FIRST_V2:
        raise UsageError(
            f"ASSAY_RESPONSES=seeded on vLLM {version}, whose V2 runner has no logits processors",
            wanted="vLLM 0.31 or newer, or the V1 runner, which vLLM would choose without saying so",
            do="install a newer vLLM, set VLLM_USE_V2_MODEL_RUNNER=0, or ASSAY_RESPONSES=sketched",
        )
    reported = str(getattr(config.model_config, "logprobs_mode", "raw_logprobs"))
    if reported.startswith("processed"):
        raise UsageError(
            f"ASSAY_RESPONSES=seeded with --logprobs-mode {reported}",
            wanted="log-probabilities of the model: the processed scores hold the noise",
            do="leave --logprobs-mode out, or pass raw_logits",
        )
    for name in ("return_sampling_mask", "watermark_config"):
        if getattr(config.model_config, name, None) or getattr(config, name, None):
            raise UsageError(
                f"ASSAY_RESPONSES=seeded with {name}, which describes another sampler",
                wanted="one sampler",
                do="leave it out, or ASSAY_RESPONSES=sketched",
            )
