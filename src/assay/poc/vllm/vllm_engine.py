"""The engines of nonces that the prover, the verifier and the service use.

Legend of shapes: M nonces, N tokens of each.
"""

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property, partial
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal
from numpy.typing import NDArray
from typing_extensions import override

from assay.errors import EngineEnded, UsageError
from assay.models.frame import Frame
from assay.models.load import identify
from assay.models.resolve import resolve
from assay.poc.engines.base import Engine, Values, check_supported
from assay.poc.protocol.checks import check_batch_size
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import Pipeline, check_frame, runs_on_vllm
from assay.poc.protocol.round import Input, Round, RoundInputs
from assay.poc.vllm.client import Client, connect, most_positions
from assay.poc.vllm.compatibility import EXTENSION, check_config, check_installed
from assay.poc.vllm.nonce_streams import NonceStream, PointStream, TokenStream
from assay.poc.vllm.rows import Spec
from assay.poc.vllm.throttle import NoncePath, ThrottleSettings
from assay.poc.vllm.vllm_start import explain_start, fit_machine

OWN_WAIT = 2.0  # seconds of nonces at once in an engine without chat
STREAMS = {"tokens": TokenStream, "points": PointStream}
"""How nonces of several steps run, by what their pipeline publishes."""

T = TypeVar("T")


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
        # A nonce has no text, and a checkpoint of random weights has no tokenizer.
        "skip_tokenizer_init": True,
    }
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
