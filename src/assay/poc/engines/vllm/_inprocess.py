"""An engine that this process starts and ends: what ``--engine vllm`` runs."""

import asyncio
import os
import threading
from types import TracebackType
from typing import Any

from assay.errors import ModelError, UsageError
from assay.models import checkpoint_directory, identify
from assay.poc.engines.vllm._client import Client
from assay.poc.engines.vllm._compatibility import EXTENSION, check_config, check_installed, multiply_exactly
from assay.poc.engines.vllm._engine import Inputs, RequestEngine, capacity, most_positions
from assay.poc.engines.vllm._throttle import Throttle, ThrottleSettings

__all__ = ["VLLMEngine"]

CPU_KV_BYTES = 2**30  # vLLM would take most of the machine's memory; nonces need a little


class VLLMEngine(RequestEngine):
    """A vLLM engine that runs nonces only, with tensor and pipeline parallelism through vLLM's own options.

    Args:
        reference: Checkpoint directory, hub id or ``reference:NAME``.
        batch_size: B, the number of nonces per batch of the proof.
        seq_len: T, the number of positions of every nonce.
        dtype: Dtype of the weights; None for the checkpoint's.
        inputs: Where inputs are made: ``local`` in the workers, or ``sent`` from here.
        in_flight: Number of nonces inside the engine at once; 0 lets assay choose.
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
        inputs: Inputs = "local",
        in_flight: int = 0,
        **options: Any,
    ) -> None:
        version = check_installed()
        directory = str(checkpoint_directory(reference))
        self._thread = _Loop()
        try:
            self._llm = self._thread.run(_start(directory, dtype, options))
            config = self._llm.vllm_config
            # This engine serves no chat, so it is always full.
            settings = ThrottleSettings(in_flight=in_flight or capacity(config, seq_len))
            throttle = Throttle(settings, self._llm.output_processor.get_num_unfinished_requests, 1)
            client = self._client = Client(self._llm, throttle)
            self._thread.run(client.install())
            super().__init__(
                client,
                self._thread.loop,
                version=version,
                batch_size=batch_size,
                seq_len=seq_len,
                most_positions=most_positions(config),
                inputs=inputs,
            )
            self.model = identify(reference, dtype=client.description["dtype"])
        except BaseException:
            self.close()
            raise

    def counts(self) -> list[dict[str, int]]:
        """Return what every worker holds; between two streams everything but ``dropped`` is zero."""
        counts: list[dict[str, int]] = self._thread.run(self._client.counts())
        return counts

    def close(self) -> None:
        """End the engine and its processes."""
        llm, self._llm = getattr(self, "_llm", None), None
        client = getattr(self, "_client", None)
        if llm is not None:
            if client is not None:
                self._thread.run(client.end())
                client.release()
            self._thread.run(_shutdown(llm))
        del llm
        self._thread.close()

    def __enter__(self) -> "VLLMEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="assay-vllm", daemon=True)
        self._thread.start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


async def _start(directory: str, dtype: str | None, options: dict[str, Any]) -> Any:
    from vllm import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    fixed = {"model": directory, "enable_prompt_embeds": True, "worker_extension_cls": EXTENSION}
    own: dict[str, Any] = {"dtype": dtype or "auto", "enable_prefix_caching": False}
    own["skip_tokenizer_init"] = True  # a nonce has no text, and a checkpoint of random weights has no tokenizer
    if current_platform.is_cpu() and "gpu_memory_utilization" not in options:
        own["kv_cache_memory_bytes"] = CPU_KV_BYTES
    chosen = own | options | fixed
    if not current_platform.is_cpu():  # vLLM forks, and a forked process cannot use a GPU that its parent has used
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        multiply_exactly(chosen["dtype"])
    try:
        config = AsyncEngineArgs(**chosen).create_engine_config()
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"options of vLLM: {error}"[:500], wanted="its engine arguments", do="see `vllm serve --help`"
        ) from None
    check_config(config)
    try:
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:  # vLLM fails to start in many ways
        raise ModelError(
            f"vLLM does not start: {type(error).__name__}: {error}"[:500], wanted="an engine", do="see its log above"
        ) from error


async def _shutdown(llm: Any) -> None:
    llm.shutdown()
