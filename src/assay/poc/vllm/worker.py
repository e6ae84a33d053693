"""The part in vLLM's workers: makes inputs of nonces, keeps their states, transforms them.

vLLM mixes :class:`WorkerExtension` into its worker class (``--worker-extension-cls``) and calls its
methods by name through ``collective_rpc``. Arguments and results are plain types. Every attribute
is called ``assay_…``, because vLLM's ``WorkerWrapperBase.init_worker`` refuses an extension with a
name that the worker already has.

Two methods of the model runner are wrapped on the instance: ``execute_model``, which both runners
call with the ``SchedulerOutput`` of a step before they read the embeddings of its new requests, and
``sample_tokens``, which both call while ``execute_model_state`` still holds the hidden states of
the step. An exception in either would end the engine, and with it every chat, so both catch
everything: a nonce that fails is reported when it is collected.

Legend of shapes: B nonces, T positions, N tokens of a step, D hidden size.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from assay import streams
from assay.errors import UsageError, reason_of
from assay.models.frame import Frame
from assay.poc.engines.base import HostCopy, noise_inputs, token_inputs
from assay.poc.protocol.pipelines import Positions, get_pipeline
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import Transform
from assay.poc.vllm.decoding import Decoding, decoding_blocker
from assay.poc.vllm.direct_passes import DeviceTimer, DirectPasses, direct_path_blocker
from assay.poc.vllm.lockstep import all_ready
from assay.poc.vllm.points import Chains
from assay.poc.vllm.rows import (
    CLAIMED,
    LONGEST_REASON,
    MAX_SUMMED,
    MAX_VALUES,
    Chunk,
    Rows,
    RowStream,
    Spec,
    StepRow,
    call_before,
    describe,
    is_first_of_group,
    is_first_stage,
    pack_values,
    spans,
)
from assay.streams.arrays import dtype_name

log = logging.getLogger("assay.vllm")

MAX_TRANSFORMS = 4

Reply = dict[str, Any]


class WorkerExtension:
    """Methods that vLLM adds to its workers."""

    # Attributes of vLLM's worker, and what ``assay_install`` sets.
    model_runner: Any
    vllm_config: Any
    assay_hooks: "Hooks"
    assay_passes: DirectPasses
    # Waits for the values of the last call, until they are asked for.
    assay_pending: Callable[[], Reply] | None = None

    def assay_install(self) -> Reply:
        """Wrap the model runner once, and describe this worker."""
        runner = self.model_runner
        config = self.vllm_config
        if not hasattr(self, "assay_hooks"):
            self.assay_hooks = Hooks(runner, config)
            measured = int(getattr(self, "peak_activation_memory", 0))
            self.assay_passes = DirectPasses(
                runner, config, self.assay_hooks.transform, activations=measured
            )
        return {
            "decodes": decoding_blocker(runner, config) is None,
            **describe(runner, config),
        }

    def assay_open(
        self, key: str, round: dict[str, Any], preset: str, frame: bytes | None = None
    ) -> str | None:
        """Begin a stream of a round's nonces; return the reason if it is refused.

        ``frame`` is the file of the checkpoint's frame, for the presets that have one.
        """
        try:
            pipeline = get_pipeline(preset)
            takes_embeds = self.vllm_config.model_config.enable_prompt_embeds
            if frame is None and not pipeline.steps and not takes_embeds:
                raise UsageError(
                    f"{preset} without --enable-prompt-embeds",
                    wanted="input embeddings",
                    do="serve with --enable-prompt-embeds, or agree on tokens-1",
                )
            opened_frame = None if frame is None else Frame.from_bytes(frame)
            self.assay_hooks.open(key, Spec(Round(**round), pipeline, opened_frame))
        except Exception as error:
            return reason_of(error)[:LONGEST_REASON]
        return None

    def assay_close(self, key: str) -> None:
        """End a stream, and drop its rows."""
        self.assay_hooks.rows.close(key)

    def assay_collect(self, key: str, nonces: list[int]) -> Reply:
        """Take the values that the pipeline publishes for nonces that have run.

        Returns ``failed``, the reasons by nonce. One worker that has hidden states adds the values
        of those nonces that were found, as :func:`pack_values` has them; or ``error``, if the
        transform fails.
        """
        return self.assay_hooks.collect(key, nonces)

    def assay_counts(self) -> dict[str, int]:
        """Return the numbers of streams, rows, failures, failed hooks and replayed passes."""
        hooks = self.assay_hooks
        passes = self.assay_passes
        return {**hooks.rows.counts(), "errors": hooks.errors, "replayed": passes.replayed}

    # Nonces beside the scheduler

    def assay_batch(self, key: str) -> Reply:
        """Prepare passes; return ``batch``, their most nonces, and ``reason`` if it is 0."""
        try:
            stream = self.assay_hooks.rows.get(key)
            assert stream is not None, "the stream has ended"
            reason = direct_path_blocker(self.model_runner, self.vllm_config, stream.spec)
            return {
                "batch": 0 if reason else self.assay_passes.prepare(stream.spec),
                "reason": reason,
            }
        except Exception as error:  # memory, or a name of vLLM
            return {"batch": 0, "reason": _describe_failure(error)}

    def assay_pass(
        self, call: str, key: str, shares: list[list[int]], batch: int, wait: bool
    ) -> list[Reply]:
        """Queue this engine's share of a call, and return the values of the call before.

        A device that had to wait for the reply to one call and for the next to be queued would idle
        for some milliseconds between the two. With ``wait`` the values of this call are returned as
        well.

        ``shares`` has the nonces of every data-parallel engine, in the order of their ranks. Each
        reply has the name of its call; the last worker of a group adds the values as
        ``assay_collect`` does; ``error`` is the reason if they did not run.
        """
        before = self.assay_pending
        self.assay_pending = self.assay_begin(call, key, shares, batch)
        replies = [] if before is None else [before()]
        return replies + self.assay_flush() if wait else replies

    def assay_flush(self) -> list[Reply]:
        """Return what the last call has computed, if nothing has asked for it yet."""
        pending = self.assay_pending
        self.assay_pending = None
        return [] if pending is None else [pending()]

    def assay_begin(
        self, call: str, key: str, shares: list[list[int]], batch: int
    ) -> Callable[[], Reply]:
        """Queue this engine's share of a call; return what waits for the values and makes the
        reply.
        """
        passes = self.assay_passes
        # An engine that steps by itself keeps its rank under this name only.
        nonces = shares[
            self.vllm_config.parallel_config.data_parallel_index if len(shares) > 1 else 0
        ]
        longest = max(shares, key=len) if passes.together else nonces
        stream = self.assay_hooks.rows.get(key)
        if passes.together and not all_ready(stream is not None and passes.ready):
            return partial(dict, call=call, error="an engine is not ready for the call")
        if stream is None:
            return partial(dict, call=call, error="the stream has ended")
        try:
            timer = DeviceTimer(self.model_runner.device)
            values = passes.begin(stream.spec, nonces, batch, longest) if longest else None
            timer.stop()
        except Exception as error:
            return partial(dict, call=call, error=_describe_failure(error))
        return partial(_reply, call, nonces, values, timer)


def _reply(call: str, nonces: list[int], values: HostCopy | None, timer: DeviceTimer) -> Reply:
    """Wait for the values of a call, which only some workers have."""
    try:
        values_of_call = (
            {}
            if values is None
            else pack_values(nonces, values.numpy()) | {"seconds": timer.seconds()}
        )
        return {"call": call, **values_of_call}
    except Exception as error:
        return {"call": call, "error": _describe_failure(error)}


def _describe_failure(error: Exception) -> str:
    """Return an error in words, which are reported so that the engine lives."""
    log.warning("nonces do not run in batches", exc_info=error)
    return reason_of(error)[:LONGEST_REASON]


class Hooks:
    """The wrapped methods of one model runner, and the rows that they keep."""

    def __init__(self, runner: Any, config: Any) -> None:
        self.rows = Rows()
        self.errors = 0
        self._runner = runner
        self._config = config
        self._model = config.model_config
        self._width = int(self._model.get_hidden_size())
        self.transform = lru_cache(MAX_TRANSFORMS)(self._make_transform)
        self._streams = streams.get_backend("auto", runner.device.type)
        self._steppers: dict[str, Decoding | Chains] = {}  # by what their pipelines publish
        on_cuda = runner.device.type == "cuda"
        self._side = torch.cuda.Stream(runner.device) if on_cuda else None  # type: ignore[no-untyped-call]
        call_before(runner, "execute_model", self._fill, self)
        call_before(runner, "sample_tokens", self._capture, self)

    def open(self, key: str, spec: Spec) -> None:
        """Begin a stream, and make what depends on the block now, so that no step waits for it."""
        if not spec.pipeline.steps:
            with torch.inference_mode():
                self.transform(spec)
        elif (output := spec.pipeline.output) not in self._steppers:
            kind = Chains if output == "points" else Decoding
            self._steppers[output] = kind(self._runner, self._config, self)
        self.rows.open(key, spec)

    def collect(self, key: str, nonces: list[int]) -> Reply:
        """Do what :meth:`WorkerExtension.assay_collect` describes."""
        stream = self.rows.get(key)
        if stream is None:
            return {"failed": {}}
        reply: Reply = {
            "failed": {
                str(nonce): stream.failed.pop(nonce) for nonce in nonces if nonce in stream.failed
            }
        }
        present, rows = stream.take(nonces)
        if present and is_first_of_group():
            try:
                with torch.inference_mode():
                    if stepper := self._steppers.get(stream.spec.pipeline.output):
                        values = stepper.values(stream, present, rows)
                    else:
                        values = self.transform(stream.spec)(
                            torch.stack(rows).float(), stream.spec.round.inputs(present)
                        )
                    reply |= pack_values(present, values.cpu().numpy())
            except Exception as error:  # reported, so that the engine lives
                reply["error"] = reason_of(error)[:LONGEST_REASON]
        return reply

    # Before a step: inputs

    def _fill(self, scheduler_output: Any = None, *args: Any, **kwargs: Any) -> None:
        """Give the new requests of nonces their inputs, in place of the placeholder tokens."""
        empty: dict[RowStream, list[tuple[int, Any]]] = {}
        for request in getattr(scheduler_output, "scheduled_new_reqs", ()):
            place_of_nonce = self.rows.find(request.req_id)
            try:
                if request.prompt_embeds is not None:
                    _disarm(request, self._width)
                if place_of_nonce and self._needs_noise(*place_of_nonce, request):
                    stream, nonce = place_of_nonce
                    empty.setdefault(stream, []).append((nonce, request))
            except Exception as error:
                if place_of_nonce:
                    self.fail(*place_of_nonce, error)
        for stream, requests in empty.items():
            # On a GPU every copy to the host costs a wait, so inputs are made for many nonces at a
            # time.
            at_once = MAX_VALUES // (stream.spec.round.seq_len * self._width)
            self._in_parts(stream, requests, at_once, self._fill_part)

    def _needs_noise(self, stream: RowStream, nonce: int, request: Any) -> bool:
        """Begin a nonce whose inputs came with its request; return whether they are to be made."""
        pipeline = stream.spec.pipeline
        if stepper := self._steppers.get(pipeline.output):
            claimed = (request.sampling_params.extra_args or {}).get(CLAIMED)
            stepper.begin(stream, nonce, request, claimed)
        elif pipeline.framed:
            _check_tokens(stream.spec, nonce, request)
        else:
            sent = request.prompt_embeds
            seq_len = stream.spec.round.seq_len
            length = len(request.prompt_token_ids if sent is None else sent)
            if length != seq_len:
                raise ValueError(f"inputs or placeholders of {length} for {seq_len} positions")
            # Later stages of a pipeline get hidden states, so only the first one makes noise.
            if sent is None and is_first_stage():
                return True
        stream.fill(nonce)
        return False

    def _fill_part(self, stream: RowStream, requests: list[tuple[int, Any]]) -> None:
        """Make the inputs [B, T, D] of new nonces on the CPU, where vLLM expects them."""
        round = stream.spec.round
        nonces = [nonce for nonce, _ in requests]
        dtype = dtype_name(self._model.dtype)
        shape = {"seq_len": round.seq_len, "hidden_size": self._width}
        # On its own CUDA stream the copy to the CPU waits for the noise only, not for the running
        # step.
        with torch.cuda.stream(self._side):
            inputs_BTD = noise_inputs(
                self._streams, round.inputs(nonces), dtype=dtype, **shape
            ).cpu()
        for (nonce, request), inputs_TD in zip(requests, inputs_BTD, strict=True):
            # V1 copies both into its InputBatch (add_request), V2 into
            # model_states/prompt_embeds.py: positions whose prompt_is_token_ids is False take their
            # embedding from prompt_embeds, not from the token.
            request.prompt_embeds = inputs_TD
            request.prompt_is_token_ids = [False] * round.seq_len
            stream.fill(nonce)

    # After a step: hidden states

    @torch.inference_mode()
    def _capture(self, *args: Any, **kwargs: Any) -> None:
        """Keep what the pipelines read of the hidden states of this step."""
        if not len(self.rows):
            return
        if (captured := spans(self._runner)) is None:
            return
        states_ND, of_step = captured
        sums: dict[tuple[RowStream, int, bool], list[tuple[int, Chunk]]] = {}
        for row, chunk in enumerate(of_step.chunks()):
            place_of_nonce = self.rows.find(chunk.request_id)
            if place_of_nonce is None or place_of_nonce[1] not in place_of_nonce[0].filled:
                continue
            stream, nonce = place_of_nonce
            round, pipeline, _ = stream.spec
            try:
                if stepper := self._steppers.get(pipeline.output):
                    stepper.read(states_ND, StepRow(stream, nonce, row, chunk))
                elif chunk.in_prompt and chunk.prompt != round.seq_len:
                    raise ValueError(
                        f"a prompt of {chunk.prompt} tokens for {round.seq_len} positions"
                    )
                elif chunk.in_prompt and isinstance(read := pipeline.read, Positions):
                    length = chunk.prompt if read.scaled else chunk.in_prompt
                    sums.setdefault((stream, length, read.scaled), []).append((nonce, chunk))
                elif chunk.ends_prompt:
                    stream.put(nonce, states_ND[chunk.start + chunk.in_prompt - 1].clone())
            except Exception as error:
                self.fail(stream, nonce, error)
        for (stream, length, scaled), pieces in sums.items():
            # The host pays for every launch, so chunks of one length are summed in one kernel.
            work = partial(self._join_part if scaled else self._add_part, states_ND)
            self._in_parts(stream, pieces, MAX_SUMMED // (length * self._width), work)
        for stepper in self._steppers.values():
            stepper.end_step()

    def _add_part(
        self, states_ND: Tensor, stream: RowStream, pieces: list[tuple[int, Chunk]]
    ) -> None:
        """Add the signed unit states of chunks of one length to the sums of earlier steps."""
        reading = self.transform(stream.spec).reading(
            stream.spec.round.inputs([nonce for nonce, _ in pieces]), stream.spec.round.seq_len
        )
        assert reading is not None
        parts = [(row, chunk, chunk.in_prompt) for row, (_, chunk) in enumerate(pieces)]
        weights = [
            reading.weights[row, at.computed : at.computed + length] for row, at, length in parts
        ]
        states_BND = torch.stack(
            [states_ND[at.start : at.start + length] for _, at, length in parts]
        )
        sums_BD = reading._replace(weights=torch.stack(weights).to(states_ND.device), first=0).sum(
            states_BND
        )
        for (nonce, chunk), sum_D in zip(pieces, sums_BD, strict=True):
            sum_D = sum_D if chunk.computed == 0 else stream.parts.pop(nonce) + sum_D
            if chunk.ends_prompt:
                stream.put(nonce, sum_D)
            else:
                stream.parts[nonce] = sum_D

    def _join_part(
        self, states_ND: Tensor, stream: RowStream, pieces: list[tuple[int, Chunk]]
    ) -> None:
        """Join the states of chunks to those of earlier steps, and sum those of prompts that end.

        The scale of a coordinate is one of all positions, so no part of a prompt can be summed
        before its end.
        """
        for nonce, chunk in pieces:
            part_TD = states_ND[chunk.start : chunk.start + chunk.in_prompt]
            before = [] if chunk.computed == 0 else [stream.parts.pop(nonce)]
            stream.parts[nonce] = torch.cat([*before, part_TD])
        if not (ended := [nonce for nonce, chunk in pieces if chunk.ends_prompt]):
            return
        reading = self.transform(stream.spec).reading(
            stream.spec.round.inputs(ended), stream.spec.round.seq_len
        )
        assert reading is not None
        states_BTD = torch.stack([stream.parts.pop(nonce) for nonce in ended])
        sums_BD = reading._replace(weights=reading.weights.to(states_ND.device)).sum(states_BTD)
        for nonce, sum_D in zip(ended, sums_BD, strict=True):
            stream.put(nonce, sum_D)

    def _in_parts(
        self,
        stream: RowStream,
        requests: list[tuple[int, Any]],
        at_once: int,
        work: Callable[[RowStream, Any], None],
    ) -> None:
        """Do work for some nonces of a stream at a time, for one at least; a part that fails fails
        its nonces.
        """
        at_once = max(1, at_once)
        for start in range(0, len(requests), at_once):
            part = requests[start : start + at_once]
            try:
                work(stream, part)
            except Exception as error:
                for nonce, _ in part:
                    self.fail(stream, nonce, error)

    def fail(self, stream: RowStream, nonce: int, error: Exception) -> None:
        """Keep the error for which a nonce could not run."""
        self.errors += 1
        stream.fail(nonce, reason_of(error)[:LONGEST_REASON])

    def _make_transform(self, spec: Spec) -> Transform:
        round, pipeline, frame = spec
        return Transform(
            round,
            pipeline,
            frame=frame,
            hidden_size=self._width,
            vocab_size=int(self._model.get_vocab_size()),
            device=self._runner.device,
        )


def _check_tokens(spec: Spec, nonce: int, request: Any) -> None:
    """Refuse a request whose prompt is not the tokens of its nonce."""
    assert spec.frame is not None
    expected = token_inputs(spec.round.inputs([nonce]), spec.frame, seq_len=spec.round.seq_len)[
        0
    ].tolist()
    if request.prompt_embeds is not None or list(request.prompt_token_ids or ()) != expected:
        raise ValueError(f"other tokens than those of nonce {nonce}")


def _disarm(request: Any, width: int) -> None:
    """Replace harmful inputs by zeros.

    Inputs of another width would end the engine. NaN and infinity would stay in the blocks of the
    cache and spoil requests that get these blocks later: any client that may send embeddings could
    stop every round on the server.
    """
    sent = request.prompt_embeds
    fits = sent.ndim == 2 and sent.shape[1] == width
    if not (fits and bool(torch.isfinite(sent).all())):
        request.prompt_embeds = torch.zeros(len(sent), width, dtype=sent.dtype)
        raise ValueError(
            "inputs that are not finite" if fits else f"inputs of shape {tuple(sent.shape)}"
        )
