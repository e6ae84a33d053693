"""Self-test of an engine: which settings change nonces, and whether noise explains it.

The same nonces run in one setting after another: again, elsewhere in the batch, beside other
nonces, alone, in another batch shape, with other kernels, and on vLLM under its switches. What a
change of setting does is judged as `verify` judges the proof of another machine.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import httpx
import numpy as np
import numpy.typing as npt
import torch

from assay.errors import AssayError, CalibrationError, ModelError, reason_of
from assay.models.model import Model
from assay.poc.engines.base import Engine
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.launch import Launch, load
from assay.poc.one_machine import engine_variant
from assay.poc.protocol.checks import MAX_NONCE, check_number
from assay.poc.protocol.header import Header
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import Record, pack_record, published_form
from assay.poc.protocol.round import Round
from assay.poc.prover import Progress, compute, describe_proof
from assay.poc.verdict.calibration_file import Calibration, noise_for
from assay.poc.verdict.honest_noise import Noise
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import sequential_test

Outcome = Literal["same bits", "within the law", "beyond the law", "no law", "not run"]
Run = Callable[[Sequence[int]], list[Record]]
"""Compute nonces, in the order in which they are given."""
Variants = dict[str, Callable[[], AbstractContextManager[tuple[Model, Engine]]]]
"""What opens the engine of every setting that needs one of its own, the usual one first."""

ALONE = 4  # nonces that run in a batch of their own, one after the other
ANSWER_SECONDS = 300.0  # of a server for one request
FEWEST_TOKENS = 2048  # of a pass of vLLM: what it takes by itself
DIVISIONS = (2, 4)  # devices over which vLLM divides every layer
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """What a setting changed, beside the usual one.

    Args:
        setting: Name of the setting.
        outcome: Whether bits are the same, and else whether the test of residuals accuses.
        nonces: Number of nonces that were compared.
        changed: Number of those whose published bytes differ.
        bits: Low bits of a published number that differ, at most.
        largest: Largest residual.
        multiple: Largest residual over a typical one of the law; None without a law.
        reason: Why the setting did not run, or why there is no law.
    """

    setting: str
    outcome: Outcome
    nonces: int = 0
    changed: int = 0
    bits: int = 0
    largest: float = 0.0
    multiple: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """The result of a self-test."""

    comparisons: tuple[SettingResult, ...]
    engine: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 where every setting that ran is within the law, 1 where one is beyond it, else 2."""
        outcomes = {comparison.outcome for comparison in self.comparisons}
        if "beyond the law" in outcomes:
            return 1
        return 2 if "no law" in outcomes else 0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"engine": self.engine, "comparisons": [asdict(row) for row in self.comparisons]}


def compare(
    setting: str,
    usual: Sequence[Record],
    again: Sequence[Record],
    noise: Noise | None,
    *,
    reason: str = "",
) -> SettingResult:
    """Compare the records of nonces in two settings; ``reason`` says why there is no law."""
    residuals_N = np.abs(residuals(usual, again))
    pairs = list(zip(usual, again, strict=True))
    changed = sum(pack_record(first) != pack_record(second) for first, second in pairs)
    outcome: Outcome = "same bits"
    if changed and noise is None:
        outcome = "no law"
    elif changed and noise is not None:
        accused = sequential_test(noise).update(residuals_N).result.verdict == "fraud"
        outcome = "beyond the law" if accused else "within the law"
    largest = float(residuals_N.max())
    return SettingResult(
        setting=setting,
        outcome=outcome,
        nonces=len(pairs),
        changed=changed,
        bits=max(_steps(first, second).bit_length() for first, second in pairs),
        largest=largest,
        multiple=None if noise is None else largest / noise.size,
        reason=reason if outcome == "no law" else "",
    )


def _steps(first: Record, second: Record) -> int:
    """Return how many numbers of the published format lie between two values, at most."""
    ordered = [_ordered(record) for record in (first, second)]
    return int(np.abs(ordered[0] - ordered[1]).max())


def _ordered(record: Record) -> npt.NDArray[np.int64]:
    """Return published numbers as whole ones that have their order, one step apart."""
    values = np.float32(record.distance) if record.vector is None else record.vector
    raw = np.atleast_1d(values)
    integers = raw.view(f"i{raw.itemsize}").astype(np.int64)
    lowest = -(2 ** (8 * raw.itemsize - 1))
    return np.where(integers < 0, lowest - integers, integers)


def run_selftest(
    launch: Launch,
    round: Round,
    *,
    batch_size: int = 16,
    nonces: int = 64,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> SelfTest:
    """Run nonces in every setting of an engine of this machine.

    Args:
        launch: Model, engine, number format and device.
        round: Round of the nonces, of a preset that does not decode.
        batch_size: Nonces of the usual batch.
        nonces: Number of nonces.
        calibration: Measured noise; that of a bundled model when None.
        progress: Function that is called with (engines done, engines in all).

    Raises:
        UsageError: An option is out of range.
        ModelError: The model cannot be loaded, or not run in its usual setting.
    """
    chosen = _spaced(nonces)
    settings = _hf_variants if launch.engine == "hf" else _started_variants
    (_, open_usual), *others = settings(launch, round, batch_size).items()
    total = len(others) + 1
    rows: list[SettingResult] = []
    with open_usual() as (model, engine):
        run = _runner(engine, round)
        usual = run(chosen)
        header = describe_proof(model, round.with_model(model.reference), chosen, engine)
        law, reason = _law(header, engine, calibration)
        back = run(chosen[::-1])[::-1]
        rows += _repeated(run, usual, chosen, law, reason)
        rows.append(compare("other places in the batch", usual, back, law, reason=reason))
    for number, (name, open_other) in enumerate(others, start=1):
        if progress:
            progress(number, total)
        try:
            with open_other() as (_, engine):
                law, reason = _law(header, engine, calibration)
                again = _runner(engine, round)(chosen)
            rows.append(compare(name, usual, again, law, reason=reason))
        except AssayError as error:
            rows.append(SettingResult(setting=name, outcome="not run", reason=error.seen))
    if progress:
        progress(total, total)
    return SelfTest(comparisons=tuple(rows), engine=header.fingerprint.as_dict())


def run_remote_selftest(
    url: str,
    round: Round,
    *,
    key: str = "",
    batch_size: int = 16,
    nonces: int = 64,
    noise: Noise | None = None,
) -> SelfTest:
    """Compute the same nonces on a running server in several ways, by jobs that wait.

    Its switches stay as they are: again, beside others, alone and in another batch are what a
    client can choose. With a prefix cache the second answer comes out of it.

    Args:
        url: Address of the server, with its prefix: ``http://127.0.0.1:8000/api/v1/pow``.
        round: Round of the nonces, of a preset that publishes vectors and does not decode, with
            the model as the server names it.
        key: Key for the server; empty where it has none.
        batch_size: Nonces of the usual batch.
        nonces: Number of nonces.
        noise: Honest noise between two engines like this one.

    Raises:
        UsageError: The number of nonces is out of range.
        ModelError: The server does not answer, or refuses.
    """
    chosen = _spaced(nonces)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=ANSWER_SECONDS, headers=headers) as client:
        ask = partial(_ask, client, url.rstrip("/"), round)
        usual = ask(batch_size, chosen)
        reason = "no calibration of this preset"
        rows = _repeated(partial(ask, batch_size), usual, chosen, noise, reason)
        smaller = max(1, batch_size // 4)
        again = ask(smaller, chosen)
        rows.append(compare(f"batches of {smaller}", usual, again, noise, reason=reason))
    return SelfTest(comparisons=tuple(rows), engine={"url": url})


def _spaced(nonces: int) -> range:
    """Return so many nonces, between which others have a place."""
    check_number("nonces", nonces, 1, MAX_NONCE // 2)
    return range(0, 2 * nonces, 2)


def _repeated(
    run: Run, usual: Sequence[Record], chosen: range, law: Noise | None, reason: str
) -> list[SettingResult]:
    """Compare nonces that run again, beside others, and alone."""
    beside = run(range(2 * len(chosen)))[::2]
    alone = [run(chosen[at : at + 1])[0] for at in range(min(ALONE, len(chosen)))]
    pairs = {
        "again": (usual, run(chosen)),
        "other neighbours": (usual, beside),
        "alone in the batch": (usual[: len(alone)], alone),
    }
    return [
        compare(name, first, second, law, reason=reason) for name, (first, second) in pairs.items()
    ]


def _law(
    header: Header, engine: Engine, calibration: Calibration | None
) -> tuple[Noise | None, str]:
    """Return the honest noise between the usual engine and another, or why a law is missing."""
    try:
        noise = noise_for(header, engine.fingerprint, calibration)
    except CalibrationError as error:
        return None, error.seen
    return noise, "no calibration, and no law that comes with assay"


def _runner(engine: Engine, round: Round) -> Run:
    """Return a function that computes nonces of a round on an engine."""
    pipeline = get_pipeline(round.preset)
    return lambda nonces: [
        record for batch in compute(engine, pipeline, round.inputs(nonces)) for record in batch
    ]


def _hf_variants(launch: Launch, round: Round, batch_size: int) -> Variants:
    """Return the settings of the engine on transformers: batch, kernels, attention and threads."""
    frame = launch.read_frame(get_pipeline(round.preset))
    model = load(launch.model, launch.dtype, launch.device).with_frame(frame)
    compiled = worth_compiling(model)
    smaller = max(1, batch_size // 4)

    def opened(
        size: int = batch_size, *, plain: bool = False, eager: bool = False, fewer: bool = False
    ) -> AbstractContextManager[tuple[Model, Engine]]:
        return engine_variant(
            model,
            plain=plain,
            fewer_threads=fewer,
            batch_size=size,
            seq_len=round.seq_len,
            compiled=compiled and not (plain or eager),
        )

    variants: Variants = {"usual": opened, f"batches of {smaller}": partial(opened, smaller)}
    if str(model.module.config._attn_implementation) != "eager":
        variants["eager attention"] = partial(opened, plain=True)
    if compiled:
        variants["eager kernels"] = partial(opened, eager=True)
    if model.device.type == "cpu" and torch.get_num_threads() > 1:
        variants["half of the threads"] = partial(opened, fewer=True)
    return variants


def _started_variants(launch: Launch, round: Round, batch_size: int) -> Variants:
    """Return the settings of an engine that is started for each: batches, and switches of vLLM.

    Whole batches run inside the workers, beside vLLM's scheduler, so a switch of the scheduler
    shows only where nonces are requests.
    """
    smaller = max(1, batch_size // 4)
    uncut = max(FEWEST_TOKENS, batch_size * round.seq_len)  # tokens of a pass that cuts no nonce
    chunk = max(smaller, round.seq_len // 2 + 1)
    usual: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": uncut}
    requests = usual | {"path": "requests"}
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": chunk}

    opened = partial(
        launch.start,
        launch,
        launch.dtype,
        frame=launch.read_frame(get_pipeline(round.preset)),
        seq_len=round.seq_len,
        batch_size=batch_size,
    )
    if launch.engine != "vllm":
        return {"usual": opened, f"batches of {smaller}": partial(opened, batch_size=smaller)}
    options: dict[str, dict[str, Any]] = {
        "as requests": requests,
        "prefix cache": requests | {"enable_prefix_caching": True},
        "chunked prefill": requests | chunks | {"max_num_seqs": smaller},
        "speculative decoding": requests | {"speculative_config": SPECULATION},
    }
    for count in DIVISIONS:
        if torch.cuda.device_count() >= count:
            options[f"divided over {count} devices"] = usual | {"tensor_parallel_size": count}
    return {
        "usual": partial(opened, options=usual),
        f"batches of {smaller}": partial(opened, batch_size=smaller, options=usual),
        **{name: partial(opened, options=values) for name, values in options.items()},
    }


def _ask(
    client: httpx.Client, url: str, round: Round, batch_size: int, nonces: Sequence[int]
) -> list[Record]:
    """Return the records of nonces that a server computes in batches of a size."""
    pipeline = get_pipeline(round.preset)
    shared = ("block_hash", "block_height", "public_key", "node_id", "node_count")
    body = {name: getattr(round, name) for name in shared} | {
        "wait": True,
        "params": {
            "model": round.model,
            "seq_len": round.seq_len,
            "k_dim": pipeline.vector_size,
            "preset": round.preset,
        },
        "nonces": list(nonces),
        "batch_size": batch_size,
    }
    try:
        answer = client.post(f"{url}/generate", json=body)
        if not answer.is_success:
            # The server says which of the parameters is not its own.
            raise httpx.HTTPError(f"status {answer.status_code}, {answer.text}")
        texts = {
            artifact["nonce"]: artifact["vector_b64"] for artifact in answer.json()["artifacts"]
        }
        form = published_form(pipeline)
        return [form.unpack(nonce, texts[nonce], pipeline) for nonce in nonces]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{url}/generate: {reason_of(error)}"[:500],
            wanted="the vectors of all nonces that were asked for",
            do="check the address, the key, the model, its length of a nonce (--seq-len) and the "
            "preset, and ask for fewer nonces where the server takes longer than a minute",
        ) from error
