"""Passes of the direct path inside vLLM's workers.

A pass that only prefills reads in every layer nothing but the keys and values that this layer has
just written: one private cache of one layer's size serves all layers in turn, and blocks of
vLLM's own cache are neither needed nor touched. A layer looks its cache up when it is called
(``get_attention_context`` in ``model_executor/layers/attention/attention.py``), so it is given
the private one for the time of a pass. Every other tensor is made anew: the persistent ones of a
model runner may still be read by a step. vLLM's CUDA graphs have its own cache in them, so passes
are recorded in others.

Legend of shapes: B nonces of a pass, T positions, N = B·T tokens, D hidden size, P blocks of a
nonce.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from assay import streams
from assay.errors import reason_of
from assay.models.device import free_bytes
from assay.poc.engines.base import HostCopy, device_tokens, noise_inputs
from assay.poc.protocol.transforms import Transform
from assay.poc.vllm.compatibility import runner_kind
from assay.poc.vllm.lockstep import end_engine
from assay.poc.vllm.rows import MAX_SUMMED, MAX_VALUES, Spec, is_first_of_group
from assay.poc.vllm.stages import FAILED, StageLink
from assay.streams.arrays import dtype_name, torch_dtype

log = logging.getLogger("assay.vllm")

BACKENDS = {"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"}
"""Kernels of attention whose cache has the block as its first axis and needs no workspace of the
runner.
"""
CACHE_SPECS = {"FullAttentionSpec"}
"""Kinds of cache blocks that hold the keys and values of one layer, and nothing that lives from
step to step.
"""
MAX_TABLES = 8  # shapes of passes whose metadata is kept
# Bytes of activations that a recorded pass may keep from vLLM.
MAX_GRAPH = 2**30
# Columns of a block table behind the last block: tiles of a kernel may look past it.
SPARE_BLOCKS = 8


class DeviceTimer:
    """Measures the device time of queued work until :meth:`stop`, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._events[0].record()
        self._seconds = -time.perf_counter()

    def stop(self) -> None:
        """Take the end of the work; a CPU has done it by now."""
        self._seconds += time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Wait for the end, and return the time of the device."""
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


class PassGraph:
    """The layers of a pass as a CUDA graph, because a small model waits for kernel launches.

    SmolLM2 on an H200 proves 5000 nonces a second with it and 2050 without, in one run (note of
    vllm_real.json). ``run`` computes the states from inputs at fixed addresses; its kernels are
    those that it starts without a graph, and every other tensor that they read must be held by it.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> None:
        self._inputs = {
            name: None if values is None else values.clone() for name, values in inputs.items()
        }
        self._run = run
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._states_ND = run(self._inputs)
        except Exception:
            # torch's allocator goes on recording after a capture that CUDA has ended.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(before.device_index, pool)
                torch._C._cuda_releasePool(before.device_index, pool)
            with (
                suppress(RuntimeError),
                torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
            ):
                # So do its random numbers, until a capture ends well.
                torch.zeros(1, device=f"cuda:{before.device_index}").add_(1)
            raise
        finally:
            # Torch leaves that of a capture that fails in its place.
            torch.cuda.set_stream(before)

    def __call__(self, inputs: dict[str, Tensor | None]) -> Tensor:
        """Queue the pass; the next one overwrites its states."""
        for name, values in inputs.items():
            if values is not None:
                self._inputs[name].copy_(values)  # type: ignore[union-attr]
        self._graph.replay()
        return self._states_ND


def may_record(runner: Any, config: Any) -> bool:
    """Return whether passes may be CUDA graphs: vLLM has them, and only GPU kernels run.

    Mixtures were not tried; copies of weights that vLLM moves during a pass would have to be
    joined.
    """
    if runner.device.type != "cuda" or config.model_config.is_moe:
        return False
    parallel = config.parallel_config
    prefetch = config.offload_config.prefetch
    mode = getattr(config.compilation_config.cudagraph_mode, "name", "NONE")
    return (
        mode != "NONE"
        and int(parallel.tensor_parallel_size) == int(parallel.pipeline_parallel_size) == 1
        and not prefetch.offload_group_size
    )


def direct_path_blocker(runner: Any, config: Any, spec: Spec) -> str | None:
    """Return why nonces of a round must be requests; None where they may run in calls."""
    scheduler = config.scheduler_config
    model = config.model_config
    parallel = config.parallel_config
    compilation = config.compilation_config
    groups = runner.kv_cache_config.kv_cache_groups
    specs = {type(group.kv_cache_spec).__name__ for group in groups}
    backends = {group.backend.get_name() for outer in runner.attn_groups for group in outer}
    layers = _attention_layers(runner, config)
    shared = [getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers]
    checks = (
        (
            spec.round.seq_len > scheduler.max_num_batched_tokens,
            "nonces longer than a step of the engine",
        ),
        (len(groups) != 1, f"layers of {len(groups)} kinds"),
        (specs - CACHE_SPECS, f"a cache of {', '.join(sorted(specs))}"),
        (backends - BACKENDS, f"attention by {', '.join(sorted(backends))}"),
        (any(shared), "layers that share a cache"),
        (
            len({_cache_layout(layer.kv_cache) for layer in layers} | {None}) != 2,
            "caches of several forms",
        ),
        (config.speculative_config is not None, "speculative decoding"),
        (config.lora_config is not None, "--enable-lora"),
        (config.kv_transfer_config is not None, "--kv-transfer-config"),
        (model.enable_sleep_mode, "--enable-sleep-mode: the weights may be away"),
        (
            model.uses_mrope and runner.device.type != "cpu",
            "positions of several dimensions, which ran on a CPU only",
        ),
        (
            getattr(runner.model, "requires_raw_input_tokens", False),
            "a model that reads the tokens themselves",
        ),
        (
            parallel.pipeline_parallel_size > 1
            and (parallel.distributed_executor_backend == "ray" or runner_kind(runner) == "v1"),
            "stages over Ray or with the V1 runner, which were not tried",
        ),
        (
            parallel.data_parallel_size > 1
            and parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1,
            "engines that step together on several devices each, which were not tried",
        ),
        (parallel.enable_eplb, "--enable-eplb"),
        (parallel.use_ubatching, "--enable-dbo"),
        (getattr(compilation.pass_config, "enable_sp", False), "sequence parallelism"),
    )
    return next((reason for blocks, reason in checks if blocks), None)


class DirectPasses:
    """Forward passes of one worker over batches of nonces.

    ``transform`` returns the transform of a round, and ``activations`` are the bytes that vLLM
    measured for those of its largest step, 0 where it measured none.
    """

    def __init__(
        self,
        runner: Any,
        config: Any,
        transform: Callable[[Spec], Transform],
        *,
        activations: int = 0,
    ) -> None:
        self._runner = runner
        self._config = config
        self._transform = transform
        self._width = int(config.model_config.get_hidden_size())
        self._dtype = dtype_name(config.model_config.dtype)
        self._streams = streams.get_backend("auto", runner.device.type)
        self._activations = activations
        stages = int(config.parallel_config.pipeline_parallel_size)
        self._link = StageLink(stages, runner.device)
        self.together = int(config.parallel_config.data_parallel_size) > 1
        """Whether this engine steps together with others; of a dense model each is told to be
        alone.
        """
        self._has_run = False  # a pass
        # Embeddings; with stages the states and residuals that are received, or sent twice.
        self._handed = 1 if stages == 1 else 4
        self._cache: Tensor | None = None
        self._blocks = 0  # of the largest cache so far, which open streams may need
        self._tables = lru_cache(MAX_TABLES)(self._make_tables)
        # Which passes, and their graph if they have one.
        self._recorded: tuple[Any, PassGraph | None] | None = None
        self._records = may_record(runner, config)
        self.replayed = 0  # passes that ran as a graph

    def prepare(self, spec: Spec) -> int:
        """Make the private KV cache for passes of a round; return the most nonces of a pass.

        Its axes lie in memory as those of vLLM's own cache do.
        """
        batch = self._batch(spec.round.seq_len)
        layer_cache = self._layer_cache()
        blocks = 1 + batch * -(-spec.round.seq_len // int(layer_cache.shape[2]))
        if self._cache is None or self._cache.shape[0] < blocks:
            self._recorded = None  # which has it in it
            # Freed before the larger one is made. If there is no room, the next is no smaller than
            # this one: kernels would write past it.
            self._cache = None
            blocks = max(blocks, self._blocks)
            shape = (blocks, *layer_cache.shape[1:])
            order = _axis_order(layer_cache)
            self._cache = torch.empty_permuted(
                shape, order, dtype=layer_cache.dtype, device=layer_cache.device
            ).zero_()
            self._blocks = blocks
        return batch

    def _batch(self, seq_len: int) -> int:
        """Return B, at least 1.

        A pass is shorter than vLLM's largest step by so much that inputs and private cache fit into
        the memory that vLLM has measured for the activations of that step, and left free.
        """
        scheduler = self._config.scheduler_config
        cache = self._layer_cache()
        largest = int(scheduler.max_num_batched_tokens)
        most = largest // seq_len
        if self._activations:
            blocks = -(-seq_len // int(cache.shape[2]))
            bytes_per_nonce = blocks * cache[0].numel() * cache.element_size()
            itemsize = torch_dtype(self._dtype).itemsize
            bytes_per_nonce += self._handed * seq_len * self._width * itemsize
            most = min(
                most,
                int(self._activations / (seq_len / largest * self._activations + bytes_per_nonce)),
            )
        return max(1, min(most, int(scheduler.max_num_seqs)))

    @property
    def ready(self) -> bool:
        """Whether passes may begin: no step of vLLM is unfinished, and there was room for the
        cache.
        """
        return self._runner.execute_model_state is None and self._cache is not None

    @torch.inference_mode()
    def begin(
        self, spec: Spec, nonces: list[int], batch: int, longest: list[int]
    ) -> HostCopy | None:
        """Queue passes, and return the published values; None on workers that do not answer.

        ``batch`` is the number of nonces of a pass, which :meth:`prepare` gave; the last pass has
        the rest. A pass that fails is the last one that computes, unless other engines wait for
        those after it; the next stage hears of all. Where others wait within a pass for layers that
        failed, this engine ends. If its very first pass fails, theirs fail alike.

        ``longest`` is the longest share of the engines that step together, and ``nonces`` itself
        where there are no others: every engine runs as many passes, without nonces of its own over
        one of those.

        Raises:
            RuntimeError: A step of vLLM is not finished, there is no cache, or an earlier stage
                failed.
        """
        failure: Exception | None = None
        if not self.ready:
            failure = RuntimeError("a step of vLLM is not finished, or there is no cache")
        rows = []
        for start in range(0, len(longest), batch):
            part = nonces[start : start + batch]
            received = self._link.receive()
            states = None
            if failure is None or self.together:
                try:
                    states = self._forward(spec, part or longest[:1], received)
                    self._has_run = True
                    if part and self._link.is_last:
                        rows.append(self._rows(spec, part, states))
                except Exception as error:
                    failure = error
                    if self.together and self._has_run and states is None:
                        end_engine(error)
            self._link.send(states)
        if failure is not None:
            raise failure
        return (
            HostCopy(self._transform(spec)(torch.cat(rows).float(), spec.round.inputs(nonces)))
            if nonces and self._link.is_last and is_first_of_group()
            else None
        )

    def _rows(self, spec: Spec, nonces: list[int], states_ND: Tensor) -> Tensor:
        """Return what is read of the hidden states of one pass, [B, D]."""
        seq_len = spec.round.seq_len
        states_BTD = states_ND[: len(nonces) * seq_len].view(len(nonces), seq_len, -1)
        if spec.pipeline.read == "last":
            # A view would keep the states of every pass.
            return states_BTD[:, -1].clone()
        reading = self._transform(spec).reading(spec.round.inputs(nonces), seq_len)
        assert reading is not None
        at_once = max(1, MAX_SUMMED // ((seq_len - reading.first) * self._width))
        parts = (
            torch.split(values, at_once)
            for values in (states_BTD, reading.weights.to(states_BTD.device))
        )
        return torch.cat(
            [
                reading._replace(weights=part_BT).sum(part)
                for part, part_BT in zip(*parts, strict=True)
            ]
        )

    def _forward(self, spec: Spec, nonces: list[int], received: dict[str, Tensor] | None) -> Any:
        """Make the inputs of nonces, or take the states of the stage before, and run all layers.

        Returns the hidden states [N, D] of the last one; on other stages than the last, what vLLM
        hands on. Whole passes of one kind are recorded after the first of them, in which kernels
        are chosen and compiled.
        """
        seq_len = spec.round.seq_len
        inputs = self._inputs(spec, nonces) if received is None else _taken(received)
        run = partial(self._layers, self._tables(len(nonces), seq_len), seq_len)
        if not self._records or len(nonces) != self._batch(seq_len):
            return run(inputs)
        kind = (seq_len, *(name for name, values in inputs.items() if values is not None))
        if self._recorded is None or self._recorded[0] != kind:
            # Give its memory back first.
            self._recorded = None
            states_ND = run(inputs)
            self._recorded = kind, self._record(run, inputs, len(nonces) * seq_len)
            return states_ND
        graph = self._recorded[1]
        if graph is None:
            return run(inputs)
        self.replayed += 1
        return graph(inputs)

    def _record(
        self, run: Callable[..., Tensor], inputs: dict[str, Tensor | None], tokens: int
    ) -> PassGraph | None:
        """Return the graph of a pass that has run; None where it cannot be recorded, or memory is
        short.

        The graph keeps the activations of its pass, its inputs and its states. vLLM must still have
        those of its largest step, which it has measured and left free.
        """
        needed = (
            self._activations * tokens / int(self._config.scheduler_config.max_num_batched_tokens)
        )
        free = free_bytes(self._runner.device)
        if not 0 < needed <= MAX_GRAPH or free < self._activations + 2 * needed:
            log.info(
                "passes are not recorded: activations of %.0f bytes, and %d are free", needed, free
            )
            return None
        try:
            return PassGraph(run, inputs)
        except Exception as error:  # a kernel that waits for the device, say: passes run as before
            log.warning("passes of nonces are not recorded in CUDA graphs: %s", reason_of(error))
            self._records = False
            return None

    def _layers(
        self,
        tables: tuple[dict[str, Any], Tensor, Tensor],
        seq_len: int,
        inputs: dict[str, Any],
    ) -> Any:
        """Run all layers over the inputs of nonces; return what the model returns."""
        from vllm.forward_context import set_forward_context

        metadata, slots_N, positions_N = tables
        by_layer = dict.fromkeys(metadata, slots_N)
        with (
            self._private_cache(partial=seq_len % int(self._layer_cache().shape[2]) > 0),
            set_forward_context(
                metadata, self._config, num_tokens=len(slots_N), slot_mapping=by_layer
            ),
        ):
            return self._runner.model(
                positions=positions_N, **{"intermediate_tensors": None} | inputs
            )

    def _inputs(self, spec: Spec, nonces: list[int]) -> dict[str, Tensor | None]:
        """Return what the model reads of nonces: tokens [N], or input embeddings [N, D]."""
        inputs = spec.round.inputs(nonces)
        seq_len = spec.round.seq_len
        device = self._runner.device
        if spec.frame is not None:
            # The layers are compiled for ids of 32 bits, and vLLM drops the guards that would
            # notice others.
            ids_N = device_tokens(self._streams, inputs, spec.frame, seq_len=seq_len)
            if not self._config.model_config.enable_prompt_embeds:
                return {"input_ids": ids_N, "inputs_embeds": None}
            # With prompt embeddings vLLM runs every step on embeddings, and compiles the layers for
            # them.
            return {"input_ids": None, "inputs_embeds": self._runner.model.embed_input_ids(ids_N)}
        at_once = max(1, MAX_VALUES // (seq_len * self._width))
        shape = {"seq_len": seq_len, "hidden_size": self._width}
        parts = [
            noise_inputs(self._streams, inputs[at : at + at_once], dtype=self._dtype, **shape).to(
                device
            )
            for at in range(0, len(nonces), at_once)
        ]
        inputs_ND = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, self._width)
        return {"input_ids": None, "inputs_embeds": inputs_ND}

    @contextmanager
    def _private_cache(self, *, partial: bool) -> Iterator[None]:
        """Give every layer the private cache.

        Behind the last position of a nonce a block has values of earlier passes, which kernels load
        and then mask: NaN among them would come through, so where a block is not filled the cache
        begins with zeros.
        """
        assert self._cache is not None
        layers = _attention_layers(self._runner, self._config)
        caches = [layer.kv_cache for layer in layers]
        if partial:
            self._cache.zero_()
        try:
            for layer in layers:
                layer.kv_cache = self._cache
            yield
        finally:
            for layer, cache in zip(layers, caches, strict=True):
                layer.kv_cache = cache

    def _make_tables(self, batch: int, seq_len: int) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Return the attention metadata of a pass by layer, the slots [N] in the cache, and the
        positions.

        The positions are [N], or [3, N] for a model that has time, height and width: all are the
        same in text.
        """
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.backend import CommonAttentionMetadata

        device = self._runner.device
        block_size = int(self._layer_cache().shape[2])
        blocks = -(-seq_len // block_size)
        starts = torch.arange(0, batch * seq_len + 1, seq_len, dtype=torch.int32)
        lengths = torch.full((batch,), seq_len, dtype=torch.int32)
        positions_N = torch.arange(seq_len).repeat(batch)
        table_BP = torch.zeros(batch, blocks + SPARE_BLOCKS, dtype=torch.int32)
        # Block 0 is vLLM's null block.
        table_BP[:, :blocks] = torch.arange(1, batch * blocks + 1).view(batch, blocks)
        block_N = table_BP[:, :blocks].repeat_interleave(block_size, 1)[:, :seq_len].reshape(-1)
        slots_N = (block_N.long() * block_size + positions_N % block_size).to(device)
        positions_N = positions_N.to(device)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=batch,
            num_actual_tokens=batch * seq_len,
            max_query_len=seq_len,
            max_seq_len=seq_len,
            block_table_tensor=table_BP.to(device),
            slot_mapping=slots_N,
            causal=True,
            positions=positions_N,
            is_prefilling=torch.ones(batch, dtype=torch.bool),
        )
        metadata: dict[str, Any] = {}
        with set_current_vllm_config(self._config):
            for group in self._runner.attn_groups[0]:
                # A builder of its own: that of the runner keeps buffers, and fixes settings at its
                # first use.
                own_builder = group.get_metadata_builder()
                builder = type(own_builder)(
                    own_builder.kv_cache_spec, own_builder.layer_names, self._config, device
                )
                built = builder.build(0, common, fast_build=True)
                metadata |= dict.fromkeys(own_builder.layer_names, built)
        model = self._config.model_config
        return (
            metadata,
            slots_N,
            positions_N.repeat(model.mrope_num_dims, 1) if model.uses_mrope else positions_N,
        )

    def _layer_cache(self) -> Tensor:
        """Return vLLM's own cache of the first layer of this worker."""
        cache: Tensor = _attention_layers(self._runner, self._config)[0].kv_cache
        return cache


def _taken(received: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the model reads of what the stage before has sent."""
    from vllm.sequence import IntermediateTensors

    if FAILED in received:
        raise RuntimeError("the stage before failed")
    states = IntermediateTensors(received)
    return {"input_ids": None, "inputs_embeds": None, "intermediate_tensors": states}


def _attention_layers(runner: Any, config: Any) -> list[Any]:
    """Return the attention layers of this worker."""
    layers = config.compilation_config.static_forward_context
    return [
        layers[name] for group in runner.attn_groups for part in group for name in part.layer_names
    ]


def _cache_layout(cache: Any) -> Any:
    """Return what the caches of all layers must share: shape of a block, dtype, order in memory.

    None for a cache that is not of blocks, heads, positions and values.
    """
    if not isinstance(cache, Tensor) or cache.ndim != 4:
        return None
    return tuple(cache.shape[1:]), cache.dtype, tuple(_axis_order(cache))


def _axis_order(cache: Tensor) -> list[int]:
    """Return the axes of a tensor as they lie in memory, the slowest first."""
    return sorted(range(cache.ndim), key=cache.stride, reverse=True)
