"""Prefills with an offline vLLM engine: the likeliest tokens in front of every token of an output, and its states.

vLLM returns the largest logits and that of the claimed token. A token that is not among them counts as one that cannot
be taken, which speaks for the node and not against it; where top-p would need the others, the response is refused. The
states that are sketched are kept in its workers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch

from assay.errors import ModelError, UsageError
from assay.models.device import processor
from assay.models.load import identify
from assay.models.resolve import checkpoint_directory
from assay.poc.protocol.pipelines import sketch_steps
from assay.poc.protocol.record import Fingerprint
from assay.poc.responses.adapters import Lora
from assay.poc.responses.prefill import Prefilled, PromptAndOutput
from assay.poc.responses.receipts import ReceiptHeader
from assay.poc.responses.replay import check_model
from assay.poc.vllm.compatibility import RESPONSE_EXTENSION, check_installed, refuse_missing
from assay.poc.vllm.engine import explain_start, fit_machine, runs_on_cpu
from assay.poc.vllm.response_worker import state_argument

LIKELIEST = 1024
"""Number of the largest logits that are asked for at every position."""

_OWN = (
    "model", "logprobs_mode", "max_logprobs", "enable_prefix_caching", "skip_tokenizer_init",
    "worker_extension_cls", "speculative_config", "spec_method", "spec_model", "spec_tokens", "kv_cache_dtype",
    "kv_cache_dtype_skip_layers", "calculate_kv_scales", "quantization", "quantization_config", "load_format",
    "hf_overrides", "hf_config_path",
)  # fmt: skip
"""Engine arguments that a replay sets itself, or under which vLLM would compute something else than the checkpoint."""


class VLLMPrefill:
    """Prefills with vLLM.

    Args:
        reference: Checkpoint directory, hub id or ``reference:NAME``.
        dtype: Dtype of the weights.
        batch_size: Number of sequences that are handed in at once.
        receipts: Headers of the receipts that it will read: those of another checkpoint are refused before it starts.
        options: Engine arguments of vLLM, for instance ``tensor_parallel_size=2``.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        UsageError: vLLM has no such option, or one that this engine sets itself.
        ProofMismatch: A header of ``receipts`` is of another checkpoint.
        ModelError: vLLM does not start.
    """

    def __init__(
        self,
        reference: str,
        *,
        dtype: str,
        batch_size: int = 16,
        receipts: Sequence[ReceiptHeader] = (),
        **options: Any,
    ) -> None:
        self._version, self._dtype = check_installed(), dtype
        _check_options(options)
        options = fit_machine(dtype, options) | options
        self.model = identify(reference, dtype=dtype)
        for header in receipts:
            check_model(header, self.model)
        self.batch_size, self._likeliest = batch_size, min(LIKELIEST, self.model.vocab_size)
        self._engine = self._started(str(checkpoint_directory(reference)), options)
        with ExitStack() as failed:
            failed.callback(self.close)
            with explain_start():
                problems = self._engine.collective_rpc("assay_sketch", args=(True,))
            refuse_missing("workers of vLLM", sorted({name for found in problems for name in found}))
            failed.pop_all()

    def _started(self, directory: str, options: dict[str, Any]) -> Any:
        """Return vLLM's ``LLM`` over a checkpoint."""
        from vllm import LLM

        with explain_start():
            return LLM(
                model=directory,
                dtype=self._dtype,
                logprobs_mode="raw_logits",
                max_logprobs=self._likeliest,
                enable_prefix_caching=False,  # a prompt of the cache has no logits
                skip_tokenizer_init=True,
                worker_extension_cls=RESPONSE_EXTENSION,
                **options,
            )

    @property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""
        on_cpu = runs_on_cpu()
        return Fingerprint(
            engine="vllm",
            device=processor(torch.device("cpu" if on_cpu else "cuda")),
            dtype=self._dtype,
            attention="vllm",
            batch_size=self.batch_size,
            seq_len=1,
            threads=torch.get_num_threads() if on_cpu else 0,
            torch=torch.__version__,
            library=f"vllm {self._version}",
        )

    def run(self, responses: Sequence[PromptAndOutput], adapter: Lora | None = None) -> Iterator[tuple[int, Prefilled]]:
        """Yield the index of every response with what gave its tokens.

        Raises:
            UsageError: An adapter was given.
            ModelError: vLLM did not run a response.
        """
        if adapter is not None:
            raise refuse_adapter()
        for start in range(0, len(responses), self.batch_size):
            batch = responses[start : start + self.batch_size]
            prompts = [{"prompt_token_ids": [*one.prompt, *one.output]} for one in batch]
            asked = [self._asked(one) for one in batch]
            made = self._engine.generate(prompts, asked, use_tqdm=False)
            states: dict[str, bytes] = {}
            for reply in self._engine.collective_rpc("assay_states"):
                # A worker knows a request by its id and a suffix.
                states |= {name.rpartition("-")[0] or name: data for name, data in reply.items()}
            for place, (response, output) in enumerate(zip(batch, made, strict=True)):
                sketched = self._states(response, states.get(str(output.request_id), b""))
                logits_NV = self._logits(response, output.prompt_logprobs)
                yield start + place, Prefilled(logits_NV, None, sketched, self._likeliest == self.model.vocab_size)

    def _asked(self, response: PromptAndOutput) -> Any:
        """Return the parameters of a request whose states are kept."""
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=self._likeliest,
            detokenize=False,
            extra_args=state_argument(len(response.prompt)),
        )

    def _states(self, response: PromptAndOutput, data: bytes) -> torch.Tensor:
        """Return the states [S, D] behind the sketched tokens of a response; there may be one of the token after it."""
        wanted = len(sketch_steps(len(response.output)))
        states_SD = np.frombuffer(data, np.float32).reshape(-1, self.model.hidden_size)[:wanted]
        if len(states_SD) != wanted:
            seen = f"vLLM with {len(states_SD)} states of {len(response.output)} tokens"
            raise ModelError(seen, wanted=f"{wanted}", do="see its log")
        return torch.from_numpy(states_SD.copy())

    def _logits(self, response: PromptAndOutput, found: Any) -> torch.Tensor:
        """Return the logits [N, V] that vLLM gave, -inf for those that it did not."""
        rows = [] if found is None else list(found)[-len(response.output) :]
        if len(rows) != len(response.output) or any(not row for row in rows):
            raise ModelError(
                "vLLM without the logits of a prompt", wanted="those of every position", do="use another version"
            )
        logits_NV = torch.full((len(rows), self.model.vocab_size), float("-inf"))
        for logits_V, row in zip(logits_NV, rows, strict=True):
            logits_V[list(row)] = torch.tensor([one.logprob for one in row.values()])
        if bool((torch.isnan(logits_NV) | (logits_NV == torch.inf)).any()):
            raise ModelError(
                f"vLLM with logits of {self.model.reference} that are NaN or infinite",
                wanted="finite logits",
                do="replay in another --dtype, or check the checkpoint",
            )
        return logits_NV

    def close(self) -> None:
        """End the engine and its processes."""
        self._engine.llm_engine.engine_core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse engine arguments of :data:`_OWN`."""
    if taken := sorted(set(options) & set(_OWN)):
        flag = "--" + taken[0].replace("_", "-")
        raise UsageError(
            f"{flag} for a replay on vLLM",
            wanted="options that do not say what is computed: the command and the checkpoint do",
            do=f"leave {flag} out of ASSAY_VLLM_ARGS, or {taken[0]} out of the options",
        )


def refuse_adapter() -> UsageError:
    """Return the refusal of an adapter: vLLM 0.32 with adapters ends when it computes logits of a whole prompt."""
    return UsageError("an adapter on vLLM", wanted="a replay on transformers", do="use --engine hf with --lora")
