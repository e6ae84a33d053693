"""The engine that the prover, the verifier and the service use, in front of any ``AsyncLLM``.

Legend of shapes: B nonces of a batch, T positions, D hidden size.
"""

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.errors import ModelError, UsageError
from assay.poc.engines._inputs import noise_inputs
from assay.poc.engines.vllm._client import Client
from assay.poc.engines.vllm._request_stream import Prompt, RequestStream
from assay.poc.engines.vllm._wire import Spec
from assay.poc.protocol import Fingerprint, Pipeline, Round

__all__ = ["Inputs", "RequestEngine", "capacity", "most_positions"]

Inputs = Literal["local", "sent"]
"""Where the inputs of a nonce are made: in the workers; or in this process, from which they are sent."""

T = TypeVar("T")


class RequestEngine:
    """Runs nonces as requests of a vLLM engine, from a thread that is not the engine's.

    Args:
        client: Client that runs single nonces in ``loop``.
        loop: Event loop of the engine.
        version: Version of vLLM.
        batch_size: B, the number of nonces handed out at a time. The throttle decides how many run at once.
        seq_len: T, the number of positions of every nonce.
        most_positions: Length of the longest prompt that the engine takes.
        inputs: Where inputs are made: ``local`` in the workers, or ``sent`` from here, bit for bit the same.

    Raises:
        UsageError: The sequence is longer than the engine takes, or the batch is out of range.
    """

    def __init__(
        self,
        client: Client,
        loop: asyncio.AbstractEventLoop,
        *,
        version: str,
        batch_size: int,
        seq_len: int,
        most_positions: int,
        inputs: Inputs = "local",
    ) -> None:
        if type(batch_size) is not int or not 1 <= batch_size <= 2**16:
            raise UsageError(f"batch size {batch_size!r}", wanted="1 to 65536", do="try --batch-size 32")
        if not 1 <= seq_len <= most_positions:
            raise UsageError(
                f"seq_len {seq_len} on this vLLM engine",
                wanted=f"at most {most_positions}: its --max-model-len, less the token that it generates",
                do=f"pass --seq-len {min(256, most_positions)}, or raise --max-model-len",
            )
        self.batch_size = batch_size
        self.seq_len = seq_len
        self._client, self._loop, self._version, self._inputs = client, loop, version, inputs
        self._worker = client.description
        self._streams = streams.get_backend("auto", "cpu")

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._worker["hidden_size"])

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the trained head."""
        return int(self._worker["vocab_size"])

    @property
    def dtype(self) -> str:
        """Name of the dtype of the weights and inputs."""
        return str(self._worker["dtype"])

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""
        worker = self._worker
        kernels = [f"runner {worker['runner']}", f"tp {worker['tensor_parallel']}", f"pp {worker['pipeline_parallel']}"]
        return Fingerprint(
            engine="vllm",
            device=worker["device"],
            dtype=self.dtype,
            attention=worker["attention"],
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            threads=worker["threads"],
            torch=torch.__version__,
            library=f"vllm {self._version}",
            kernels=(*kernels, "eager" if worker["eager"] else "compiled", *worker["cache"]),
        )

    def inputs(self, round: Round, nonces: Sequence[int]) -> Tensor:
        """Return the input embeddings [B, T, D] of B nonces, N(0, 1), in the engine's dtype."""
        shape = {"seq_len": self.seq_len, "hidden_size": self.hidden_size}
        return noise_inputs(self._streams, round, nonces, dtype=self.dtype, **shape)

    def supports(self, pipeline: Pipeline) -> bool:
        """Return whether a pipeline leaves the layers as they are and does not read the trained head.

        vLLM's compiled layers take no hooks, and it spreads the trained head over its workers.
        """
        return pipeline.layers == "none" and pipeline.head != "trained"

    def outputs(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[NDArray[Any]]:
        """Yield what the pipeline publishes of the nonces in their order, ``batch_size`` of them at a time.

        Raises:
            UsageError: The workers refuse the round.
            ModelError: vLLM did not run a nonce, or has ended.
        """
        prompt: Prompt = self.seq_len if self._inputs == "local" else lambda nonce: self.inputs(round, [nonce])[0]
        stream = RequestStream(self._client, Spec(round, pipeline.name), nonces, self.batch_size, prompt)
        yield from self._drain(stream)

    def _drain(self, stream: RequestStream) -> Generator[NDArray[Any]]:
        self._wait(stream.open())
        try:
            while (values := self._wait(stream.next())) is not None:
                yield values
        finally:
            if not self._client.ended.done():  # Client.end closes every stream
                self._wait(stream.close())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the engine's loop and wait for it in this thread.

        Raises:
            ModelError: The engine has ended, or ends meanwhile.
        """
        if self._client.ended.done() or self._loop.is_closed():
            work.close()
        else:
            running = asyncio.run_coroutine_threadsafe(work, self._loop)
            either: set[Future[Any]] = {running, self._client.ended}
            wait(either, return_when=FIRST_COMPLETED)
            if running.done() and not running.cancelled():
                return running.result()
            running.cancel()
        raise ModelError("the engine of vLLM has ended", wanted="a running engine", do="start it again")


def most_positions(config: Any) -> int:
    """Return the length of the longest prompt that an engine takes: one generated token must fit as well."""
    longest = int(config.model_config.max_model_len) - 1
    scheduler = config.scheduler_config
    chunked = bool(getattr(scheduler, "enable_chunked_prefill", True))
    return longest if chunked else min(longest, int(scheduler.max_num_batched_tokens))


def capacity(config: Any, seq_len: int = 256) -> int:
    """Return how many nonces fill one step of an engine and have the next one ready."""
    scheduler = config.scheduler_config
    step = max(1, int(scheduler.max_num_batched_tokens) // seq_len)
    return max(1, min(2 * step, int(scheduler.max_num_seqs)))
