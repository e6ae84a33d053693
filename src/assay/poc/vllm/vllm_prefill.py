"""Replays of responses on an offline engine of vLLM.

Legend of shapes: N tokens, V tokens of the vocabulary, S sketched states, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from assay.errors import ModelError, UsageError
from assay.models.device import processor
from assay.models.load import identify, load_tokenizer
from assay.models.resolve import resolve
from assay.poc.protocol.checks import check_batch_size
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import sketch_steps
from assay.poc.responses.adapters import Lora
from assay.poc.responses.prefill import (
    MOST_POSITIONS,
    Prefill,
    Prefilled,
    PromptAndOutput,
    check_finite,
)
from assay.poc.responses.receipts import ReceiptHeader
from assay.poc.responses.replaying import check_model
from assay.poc.vllm.client import most_positions
from assay.poc.vllm.compatibility import RESPONSE_EXTENSION, check_installed, check_numbers
from assay.poc.vllm.response_worker import state_argument
from assay.poc.vllm.vllm_start import explain_start, fit_machine, runs_on_cpu

# Number of the largest logits that are asked for at every position.
LIKELIEST = 1024
FIXED = (
    "model",
    "logprobs_mode",
    "max_logprobs",
    "enable_prefix_caching",
    "skip_tokenizer_init",
    "worker_extension_cls",
    "speculative_config",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "kv_cache_dtype",
    "kv_cache_dtype_skip_layers",
    "calculate_kv_scales",
    "quantization",
    "quantization_config",
    "load_format",
    "hf_overrides",
    "hf_config_path",
)
"""Engine arguments that a replay sets itself, or under which vLLM would compute something else than
the checkpoint.
"""


class VLLMPrefill(Prefill, AbstractContextManager["VLLMPrefill"]):
    """Prefills with an offline engine: the likeliest tokens at every place, and the states.

    vLLM returns the largest logits and that of the claimed token. A token that is not among them
    counts as one that cannot be taken, which speaks for the node and not against it; where top-p
    would need the others, the response is refused. The states that are sketched are kept in its
    workers.

    Args:
        reference: Checkpoint directory, hub id or ``reference:NAME``.
        dtype: Dtype of the weights.
        batch_size: Number of sequences that are handed in at once, fewer of long ones.
        receipts: Headers of the receipts that it will read: those of another checkpoint are refused
            before it starts.
        options: Engine arguments of vLLM, for instance ``tensor_parallel_size=2``.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        UsageError: vLLM has no such option, or one that this engine sets itself, or the batch size
            is out of range.
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
        check_batch_size(batch_size)
        self._version = check_installed()
        from vllm import LLM

        self._dtype = dtype
        if fixed := sorted(set(options) & set(FIXED)):
            flag = "--" + fixed[0].replace("_", "-")
            raise UsageError(
                f"{flag} for a replay on vLLM",
                wanted="options that do not say what is computed: the command and the checkpoint "
                "do",
                do=f"leave {flag} out of ASSAY_VLLM_ARGS, or {fixed[0]} out of the options",
            )
        options = fit_machine(dtype, options) | options
        self.model = replace(identify(reference, dtype=dtype), tokenizer=load_tokenizer(reference))
        for header in receipts:
            check_model(header, self.model)
        self.batch_size, self._likeliest = batch_size, min(LIKELIEST, self.model.vocab_size)
        with explain_start():
            self._engine = LLM(
                model=str(resolve(reference).checkpoint),
                dtype=dtype,
                logprobs_mode="raw_logits",
                max_logprobs=self._likeliest,
                enable_prefix_caching=False,  # a prompt of the cache has no logits
                skip_tokenizer_init=True,
                worker_extension_cls=RESPONSE_EXTENSION,
                **options,
            )
        with ExitStack() as failed:
            failed.callback(self.close)
            check_numbers(self._engine.llm_engine.vllm_config)
            with explain_start():
                self._engine.collective_rpc("assay_sketch", args=(True,))
            failed.pop_all()

    @override
    @property
    def fingerprint(self) -> Fingerprint:
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

    @override
    def run(
        self, responses: Sequence[PromptAndOutput], adapter: Lora | None = None
    ) -> Iterator[tuple[int, Prefilled]]:
        from vllm import SamplingParams

        if adapter is not None:
            raise refuse_adapter()
        most = most_positions(self._engine.llm_engine.vllm_config)
        # The last token of a response is run here, too.
        longest = 1 + max((response.positions for response in responses), default=0)
        if longest > most:
            raise UsageError(
                f"a response of {longest} tokens with its prompt on this vLLM engine",
                wanted=f"at most {most}: its --max-model-len, less the token that it generates",
                do="replay it with --engine hf, which runs the last token of no response",
            )
        start = 0
        while batch := _fitting(responses[start : start + self.batch_size]):
            prompts = [
                {"prompt_token_ids": [*response_of_batch.prompt, *response_of_batch.output]}
                for response_of_batch in batch
            ]
            parameters = [
                SamplingParams(
                    max_tokens=1,
                    temperature=0,
                    prompt_logprobs=self._likeliest,
                    detokenize=False,
                    extra_args=state_argument(len(response_of_batch.prompt)),
                )
                for response_of_batch in batch
            ]
            outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
            states: dict[str, bytes] = {}
            for reply in self._engine.collective_rpc("assay_states"):
                # A worker knows a request by its id and a suffix.
                states |= {name.rpartition("-")[0] or name: data for name, data in reply.items()}
            for place, (response, output) in enumerate(zip(batch, outputs, strict=True)):
                sketched = self._states(response, states.get(str(output.request_id), b""))
                logits_NV = self._logits(response, output.prompt_logprobs)
                check_finite(self.model, sketched, logits_NV)
                yield (
                    start + place,
                    Prefilled(logits_NV, None, sketched, self._likeliest == self.model.vocab_size),
                )
            start += len(batch)

    def _states(self, response: PromptAndOutput, data: bytes) -> torch.Tensor:
        """Return the states [S, D] behind the sketched tokens of a response; there may be one of
        the token after it.
        """
        count = len(sketch_steps(len(response.output)))
        states_SD = np.frombuffer(data, np.float32).reshape(-1, self.model.hidden_size)[:count]
        if len(states_SD) != count:
            raise ModelError(
                f"vLLM with {len(states_SD)} states of {len(response.output)} tokens",
                wanted=f"{count}",
                do="see its log",
            )
        return torch.from_numpy(states_SD.copy())

    def _logits(self, response: PromptAndOutput, logprobs: Any) -> torch.Tensor:
        """Return the logits [N, V] that vLLM gave, -inf for those that it did not."""
        rows = [] if logprobs is None else list(logprobs)[-len(response.output) :]
        if len(rows) != len(response.output) or any(not row for row in rows):
            raise ModelError(
                "vLLM without the logits of a prompt",
                wanted="those of every position",
                do="use another version",
            )
        logits_NV = torch.full((len(rows), self.model.vocab_size), float("-inf"))
        for logits_V, row in zip(logits_NV, rows, strict=True):
            logits_V[list(row)] = torch.tensor([entry.logprob for entry in row.values()])
        return logits_NV

    def close(self) -> None:
        """End the engine and its processes."""
        self._engine.llm_engine.engine_core.shutdown()

    def __exit__(self, *error: object) -> None:
        self.close()


def _fitting(responses: Sequence[PromptAndOutput]) -> Sequence[PromptAndOutput]:
    """Return the first of some responses, one at least, that have no more than
    :data:`MOST_POSITIONS`: vLLM's objects for the likeliest tokens of 8192 take two gigabytes.
    """
    totals = accumulate(response.positions + 1 for response in responses)
    return responses[: max(1, sum(total <= MOST_POSITIONS for total in totals))]


def refuse_adapter() -> UsageError:
    """Return the refusal of adapters: vLLM 0.32 ends on the logits of a whole prompt."""
    return UsageError(
        "an adapter on vLLM", wanted="a replay on transformers", do="use --engine hf with --lora"
    )
