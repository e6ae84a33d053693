"""Prefills with an offline vLLM engine: the likeliest tokens in front of every token of an output.

vLLM returns no hidden states, so sketches are not compared. It returns the largest logits and that of the claimed
token. A token that is not among them counts as one that cannot be taken, which speaks for the node and not against it.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from assay.errors import ModelError, UsageError
from assay.models import checkpoint_directory, identify
from assay.models.device import processor
from assay.poc.engines.vllm import check_installed, multiply_exactly
from assay.poc.protocol import Fingerprint
from assay.poc.responses._prefill import Prefilled, Whole

LIKELIEST = 1024
"""Number of the largest logits that are asked for at every position."""

_CPU_KV_BYTES = 2**30  # vLLM would take most of the machine's memory
_OWN = ("model", "dtype", "logprobs_mode", "max_logprobs", "enable_prefix_caching", "skip_tokenizer_init")


class VLLMPrefill:
    """Prefills with vLLM.

    Args:
        reference: Checkpoint directory, hub id or ``reference:NAME``.
        dtype: Dtype of the weights.
        batch_size: Number of sequences that are handed in at once.
        options: Engine arguments of vLLM, for instance ``tensor_parallel_size=2``.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        UsageError: vLLM has no such option, or one that this engine sets itself.
        ModelError: vLLM does not start.
    """

    def __init__(self, reference: str, *, dtype: str, batch_size: int = 16, **options: Any) -> None:
        self._version, self._dtype = check_installed(), dtype
        if taken := sorted(set(options) & set(_OWN)):
            raise UsageError(f"{taken[0]} of vLLM", wanted="an option that replay leaves open", do="leave it out")
        from vllm import LLM  # type: ignore[import-not-found]
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        self._on_cpu = bool(current_platform.is_cpu())
        if self._on_cpu:
            options.setdefault("kv_cache_memory_bytes", _CPU_KV_BYTES)
        else:
            multiply_exactly(dtype)
        self.model = identify(reference, dtype=dtype)
        self.batch_size, self._likeliest = batch_size, min(LIKELIEST, self.model.vocab_size)
        try:
            self._engine: Any = LLM(
                model=str(checkpoint_directory(reference)),
                dtype=dtype,
                logprobs_mode="raw_logits",
                max_logprobs=self._likeliest,
                enable_prefix_caching=False,  # a prompt of the cache has no logits
                skip_tokenizer_init=True,
                disable_log_stats=True,
                **options,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"options of vLLM: {error}"[:500], wanted="its engine arguments", do="see `vllm serve --help`"
            ) from None
        except Exception as error:  # vLLM fails to start in many ways
            seen = f"vLLM does not start: {type(error).__name__}: {error}"[:500]
            raise ModelError(seen, wanted="an engine", do="see its log above") from error

    @property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""
        return Fingerprint(
            engine="vllm",
            device=processor(torch.device("cpu" if self._on_cpu else "cuda")),
            dtype=self._dtype,
            attention="vllm",
            batch_size=self.batch_size,
            seq_len=1,
            threads=torch.get_num_threads() if self._on_cpu else 0,
            torch=torch.__version__,
            library=f"vllm {self._version}",
        )

    def run(self, responses: Sequence[Whole]) -> Iterator[tuple[int, Prefilled]]:
        """Yield the index of every response with what gave its tokens.

        Raises:
            ModelError: vLLM did not run a response.
        """
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=self._likeliest, detokenize=False)
        for start in range(0, len(responses), self.batch_size):
            batch = responses[start : start + self.batch_size]
            prompts = [{"prompt_token_ids": [*one.prompt, *one.output]} for one in batch]
            made = self._engine.generate(prompts, asked, use_tqdm=False)
            for place, (response, output) in enumerate(zip(batch, made, strict=True)):
                yield start + place, Prefilled(self._logits(response, output.prompt_logprobs), None)

    def _logits(self, response: Whole, found: Any) -> torch.Tensor:
        """Return the logits [N, V] that vLLM gave, -inf for those that it did not."""
        rows = [] if found is None else list(found)[-len(response.output) :]
        if len(rows) != len(response.output) or any(not row for row in rows):
            raise ModelError(
                "vLLM without the logits of a prompt", wanted="those of every position", do="use another version"
            )
        logits_NV = torch.full((len(rows), self.model.vocab_size), float("-inf"))
        for logits_V, row in zip(logits_NV, rows, strict=True):
            logits_V[list(row)] = torch.tensor([one.logprob for one in row.values()])
        return logits_NV

    def close(self) -> None:
        """End the engine and its processes."""
        del self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
