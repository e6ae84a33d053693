"""The engines that the prover, the verifier, the service and replays of responses use.

What all starts of vLLM share comes first: what the machine needs, and the words of a failure.

Legend of shapes: M nonces, N tokens of each or positions, V tokens of the vocabulary, S sketched
states, D hidden size.
"""

import asyncio
import os
from collections.abc import Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from anyio.from_thread import start_blocking_portal
from numpy.typing import NDArray
from typing_extensions import override

from assay.errors import AssayError, EngineEnded, ModelError, UsageError, reason_of
from assay.models.device import processor
from assay.models.frame import Frame
from assay.models.load import identify, load_tokenizer
from assay.models.resolve import resolve
from assay.poc.engines.base import Engine, Values, check_supported
from assay.poc.protocol.checks import check_batch_size
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import Pipeline, check_frame, runs_on_vllm, sketch_steps
from assay.poc.protocol.round import Input, Round, RoundInputs
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
from assay.poc.vllm.client import Client, connect, most_positions
from assay.poc.vllm.compatibility import (
    EXTENSION,
    RESPONSE_EXTENSION,
    check_config,
    check_installed,
    check_numbers,
)
from assay.poc.vllm.nonce_streams import NonceStream, PointStream, TokenStream
from assay.poc.vllm.response_worker import state_argument
from assay.poc.vllm.rows import Spec
from assay.poc.vllm.throttle import NoncePath, ThrottleSettings

# VLLM would take most of the machine's memory; nonces and replays need a little.
CPU_KV_BYTES = 2**30
OWN_WAIT = 2.0  # seconds of nonces at once in an engine without chat
T = TypeVar("T")
STREAMS = {"tokens": TokenStream, "points": PointStream}
"""How nonces of several steps run, by what their pipeline publishes."""
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


def runs_on_cpu() -> bool:
    """Return whether the installed build of vLLM is that for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def fit_machine(dtype: str | None, options: Mapping[str, Any]) -> dict[str, int]:
    """Prepare this process for its own engine, and return engine arguments for the machine.

    On a CPU they bound the cache, unless ``options`` say how much vLLM may take. On a GPU vLLM
    starts its processes anew: by itself it forks this one, and a forked process cannot use a GPU
    once this one has counted GPUs.
    """
    if runs_on_cpu():
        return (
            {} if "gpu_memory_utilization" in options else {"kv_cache_memory_bytes": CPU_KV_BYTES}
        )
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    multiply_exactly(dtype)
    return {}


def multiply_exactly(dtype: str | None) -> None:
    """Have triton compute float32 products exactly in this process and its children.

    By default triton rounds the factors of a float32 product to the ten bits of TF32. On a GPU
    vLLM's attention in float32 is such a kernel: distances were up to 3e-5 from those of other
    engines, where honest noise is 3e-7, and an honest node was found to be a fraud. Models in other
    formats are left alone: they do not need it, and some of their kernels would be slower.
    """
    if dtype in ("float32", "float"):
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


@contextmanager
def explain_start() -> Iterator[None]:
    """Say what went wrong where vLLM reads its options and starts.

    Raises:
        UsageError: vLLM has no such option, or refuses its value.
        ModelError: vLLM does not start.
    """
    try:
        yield
    except AssayError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"options of vLLM: {error}"[:500],
            wanted="its engine arguments",
            do="see `vllm serve --help`",
        ) from None
    except Exception as error:  # vLLM fails to start in many ways
        raise ModelError(
            f"vLLM does not start: {reason_of(error)}"[:500],
            wanted="an engine",
            do="see its log above",
        ) from error


class RequestEngine(Engine):
    """Runs nonces on a vLLM engine, from a thread that is not the engine's.

    B nonces of T positions are handed out at a time. The throttle of the client decides how many
    run at once.

    Raises:
        UsageError: The sequence is longer than the engine takes, or the batch is out of range.
    """

    def __init__(
        self, client: Client, *, batch_size: int, seq_len: int, frame: Frame | None = None
    ) -> None:
        check_batch_size(batch_size)
        _check_positions(seq_len, client.positions)
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.client = client
        self.frame = frame
        worker = client.description
        self.hidden_size = worker["hidden_size"]
        self.vocab_size = worker["vocab_size"]
        self.dtype = worker["dtype"]

    @override
    def supports(self, pipeline: Pipeline) -> bool:
        return runs_on_vllm(pipeline)

    @override
    @cached_property
    def fingerprint(self) -> Fingerprint:
        return self.client.fingerprint(self.batch_size, self.seq_len)

    @override
    def run(
        self,
        inputs: Sequence[Input],
        pipeline: Pipeline,
        claimed_MN: NDArray[Any] | None = None,
    ) -> Generator[Values]:
        if not len(inputs):
            return
        check_supported(self, pipeline)
        round, nonces = _split_round(inputs)
        if pipeline.steps:
            points = pipeline.output == "points"
            _check_positions(self.seq_len, self.client.positions, pipeline.steps + points)
        else:
            check_frame(
                pipeline, self.frame, hidden_size=self.hidden_size, vocab_size=self.vocab_size
            )
        spec = Spec(round, pipeline, self.frame if pipeline.framed else None)
        kind = STREAMS.get(pipeline.output, NonceStream)
        stream = kind(self.client, spec, nonces, self.batch_size, claimed_MN)
        try:
            self._wait(stream.open())
            while (rows := self._wait(stream.next())) is not None:
                yield stream.values(rows)
        finally:
            # Client.end closes every stream.
            if not self.client.ended.done():
                self._wait(stream.close())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the engine's loop; an engine that ends meanwhile is an EngineEnded."""
        if self.client.ended.done() or self.client.loop.is_closed():
            work.close()
        else:
            running = asyncio.run_coroutine_threadsafe(work, self.client.loop)
            either: set[Future[Any]] = {running, self.client.ended}
            wait(either, return_when=FIRST_COMPLETED)
            if running.done() and not running.cancelled():
                return running.result()
            running.cancel()
        raise EngineEnded(
            "the engine of vLLM has ended", wanted="a running engine", do="start it again"
        )


def _split_round(inputs: Sequence[Input]) -> tuple[Round, Sequence[int]]:
    """Return the round of inputs and their nonces; a stream of the workers is of one round."""
    round = inputs[0].round
    # A range of nonces may be longer than a list could be.
    if isinstance(inputs, RoundInputs):
        return round, inputs.nonces
    if any(other_round != round for other_round, _ in inputs):
        raise UsageError(
            "inputs of several rounds on vLLM",
            wanted="those of one round",
            do="run each round by itself, or use --engine hf",
        )
    return round, [nonce for _, nonce in inputs]


def _check_positions(seq_len: int, most_positions: int, steps: int = 0) -> None:
    """Refuse prompts, with the tokens that are decoded, that are longer than an engine takes."""
    room = most_positions + 1 - max(1, steps)
    if not 1 <= seq_len <= room:
        raise UsageError(
            f"seq_len {seq_len}{f' and {steps} tokens' if steps else ''} on this vLLM engine",
            wanted=f"1 to {max(1, room)}: its --max-model-len, less the tokens that it generates",
            do=f"pass --seq-len {min(256, room)}, or raise --max-model-len"
            if room > 0
            else "raise --max-model-len",
        )


class VLLMEngine(RequestEngine, AbstractContextManager["VLLMEngine"]):
    """A vLLM engine that runs nonces only, with its parallelism through vLLM's own options.

    Args:
        reference: Checkpoint directory, hub id or ``reference:NAME``.
        batch_size: B, the number of nonces per batch of the proof.
        seq_len: T, the number of positions of every nonce.
        dtype: Dtype of the weights; None for the checkpoint's.
        in_flight: Number of nonces inside the engine at once; 0 lets assay choose.
        path: Whether nonces run as whole batches inside the workers where the engine allows it, or
            as requests.
        frame: Frame of the checkpoint: the engine then runs the presets that have one and no
            others, as ordinary token prompts, without vLLM's prompt embeddings.
        options: Engine arguments of vLLM, for instance ``tensor_parallel_size=2``.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
        UsageError: vLLM has no such option, or nonces cannot run under it.
        ModelError: vLLM does not start.
    """

    def __init__(
        self,
        reference: str,
        *,
        batch_size: int = 32,
        seq_len: int = 256,
        dtype: str | None = None,
        in_flight: int = 0,
        path: NoncePath = "auto",
        frame: Frame | None = None,
        **options: Any,
    ) -> None:
        version = check_installed()
        settings = ThrottleSettings(in_flight=in_flight, wait=OWN_WAIT, path=path)
        config = configure(str(resolve(reference).checkpoint), dtype, options, embeds=frame is None)
        check_batch_size(batch_size)
        _check_positions(seq_len, most_positions(config))
        with ExitStack() as ends:
            portal = self._portal = ends.enter_context(start_blocking_portal())
            llm = portal.call(_started, config)
            ends.callback(portal.call, llm.shutdown)
            client = portal.call(partial(connect, llm, settings, seq_len, version=version))
            ends.callback(client.release)
            ends.callback(portal.call, client.end)
            super().__init__(client, batch_size=batch_size, seq_len=seq_len, frame=frame)
            self.model = identify(reference, dtype=self.dtype).with_frame(frame)
            self._ends = ends.pop_all()

    def counts(self) -> list[dict[str, int]]:
        """Return what every worker holds; between two streams everything but ``dropped`` is
        zero.
        """
        return self._portal.call(self.client.call, "assay_counts")

    def close(self) -> None:
        """End the engine and its processes."""
        self._ends.close()

    def __exit__(self, *error: object) -> None:
        self._ends.close()


def configure(directory: str, dtype: str | None, options: dict[str, Any], *, embeds: bool) -> Any:
    """Return the ``VllmConfig`` of an engine that runs nonces only, whose settings nonces can run
    under.
    """
    from vllm import AsyncEngineArgs

    fixed = {"model": directory, "enable_prompt_embeds": embeds, "worker_extension_cls": EXTENSION}
    defaults: dict[str, Any] = {
        "dtype": dtype or "auto",
        "enable_prefix_caching": False,
        "language_model_only": True,
    }
    defaults["skip_tokenizer_init"] = (
        True  # a nonce has no text, and a checkpoint of random weights has no tokenizer
    )
    with explain_start():
        config = AsyncEngineArgs(
            **defaults | fit_machine(dtype, options) | options | fixed
        ).create_engine_config()
        check_config(config)
        return config


async def _started(config: Any) -> Any:
    """Start an ``AsyncLLM``, in the event loop that it is to use."""
    from vllm.v1.engine.async_llm import AsyncLLM

    with explain_start():
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


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
        self._version = check_installed()
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
        self._engine = self._started(str(resolve(reference).checkpoint), options)
        with ExitStack() as failed:
            failed.callback(self.close)
            check_numbers(self._engine.llm_engine.vllm_config)
            with explain_start():
                self._engine.collective_rpc("assay_sketch", args=(True,))
            failed.pop_all()

    def _started(self, directory: str, options: dict[str, Any]) -> Any:
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
