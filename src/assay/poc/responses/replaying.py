"""Replay: one prefill of prompt and output, and the margins of tokens and sketches.

The idea in one line: under the same noise, the **margin** of a token is the best score minus its
own. It is 0 for the verifier's own token, and the scores of two honest engines differ by little, so
an honest margin is small. Times the temperature it is the **gap**: the least change of the logits
with which the token wins.

Where top-k, top-p or min-p limits the support, two engines may also differ in which tokens they
keep. A token with a larger score need not be overtaken if it nearly left the support, and a token
that nearly entered it is not impossible:

    gap(x) = max(enter(x), max over kept v with s_v > s_x of min(s_v − s_x, leave(v)))

``enter`` is how far x is from being kept and ``leave`` how far v is from being dropped, by the rule
that is nearest. For top-p the distance is that of the logits to the neighbour on the other side, or
of the logarithm of the odds of the sum that decides, whichever is smaller. Only the :data:`RIVALS`
largest scores are looked at as v. The profile that follows is a law of tokens whatever the gaps are
(:mod:`assay.stats`): a coarser gap costs power, and no validity.

Shapes: N steps, V tokens of the vocabulary, S sketches, G columns of a profile, R rivals.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from numpy.typing import NDArray
from torch import Tensor

from assay.errors import ProofMismatch, UsageError
from assay.models.chat import chat_template_digest
from assay.models.model import Model
from assay.poc.protocol.pipelines import sketch_steps
from assay.poc.responses.adapters import Lora
from assay.poc.responses.prefill import (
    HFPrefill,
    Prefill,
    Prefilled,
    PromptAndOutput,
    sketch_response,
)
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts
from assay.poc.responses.requests import Request
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.sampling import Sampling, counts_before, mark_tokens
from assay.poc.responses.stop_search import VIEWS
from assay.poc.verdict.response_noise import ResponseBlocks
from assay.stats.token_law import COLUMNS, SCALES, round_profiles
from assay.streams.arrays import as_tensor

RIVALS = 8  # number of larger scores that may have left the support

_AT_ONCE = 2**22  # scores that are held at a time
_BESIDE = (
    16  # tokens that a server which speculates may have made together with the end of an answer
)
# Smallest gaps that decide a profile, where the rest adds less than a billionth.
_NEAR = 64
_NEGLIGIBLE = 25.0  # in natural logarithms
# in a row, each of which doubles the error of float32: less than the step of float16 in the end
_SQUARINGS = 12


def compute_margins(s_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Return how far every score is below the best one; infinite for a dropped token."""
    return s_NV.amax(dim=1, keepdim=True) - s_NV


def measure_margins(
    logits_NV: Float32[Tensor, "N V"],
    output: tuple[int, ...],
    sampling: Sampling,
    seeds_N: NDArray[np.uint32],
    *,
    prompt: tuple[int, ...] = (),
    whole: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Measure the margins of a response's tokens under the raw logits of a prefill.

    Returns margins [N], the largest score minus that of the claimed token: 0 where it is the
    verifier's own token, infinite where the verifier would not have kept it. And profiles [N, G],
    the log-probability of the claimed tokens at every scale, as it is stored.

    Penalties may need the prompt. Where the engine did not give the ``whole`` of the logits, the
    others are -inf, and a UsageError says that they may decide which tokens top-p keeps.
    """
    vocabulary = logits_NV.shape[1]
    rows = max(1, _AT_ONCE // vocabulary)
    prompt_V = (
        as_tensor(mark_tokens(prompt, vocabulary)).to(logits_NV.device)
        if sampling.penalises
        else None
    )
    margins = []
    profiles = []
    for start in range(0, len(output), rows):
        stop = min(start + rows, len(output))
        counts_NV = (
            as_tensor(counts_before(output, vocabulary, start, stop)).to(logits_NV.device)
            if sampling.penalises
            else None
        )
        sampler = Sampler([sampling] * (stop - start), vocabulary, logits_NV.device)
        l_NV = sampler.penalise(logits_NV[start:stop], prompt_NV=prompt_V, counts_NV=counts_NV)
        if not whole:
            _check_top_p(l_NV, sampling)
        s_NV = sampler.add_noise(l_NV, seeds_N[start:stop])
        r = sampling.repetition_penalty
        # R moves noise of logits too.
        gaps_NV = compute_gaps(l_NV, s_NV, sampling, seeds_N[start:stop]) / max(r, 1 / r)
        tokens_N = torch.tensor(output[start:stop], device=l_NV.device)
        margins.append(compute_margins(s_NV).gather(1, tokens_N[:, None])[:, 0].cpu().numpy())
        profiles.append(_profiles(gaps_NV, tokens_N).cpu().numpy())
    return np.concatenate(margins), round_profiles(np.concatenate(profiles))


def compute_gaps(
    l_NV: Float32[Tensor, "N V"],
    s_NV: Float32[Tensor, "N V"],
    sampling: Sampling,
    seeds_N: NDArray[np.uint32],
) -> Float64[Tensor, "N V"]:
    """Return the gap of every token in logits: its margin, refined on a limited support.

    It follows from the logits with bias and penalties, and from the scores of the same seeds.
    """
    if sampling.greedy:
        return compute_margins(s_NV.double())
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0):
        return compute_margins(s_NV.double()) * sampling.temperature
    unlimited = replace(sampling, top_k=0, top_p=1.0, min_p=0.0)
    whole_NV = (
        Sampler([unlimited] * len(l_NV), l_NV.shape[1], l_NV.device)
        .add_noise(l_NV, seeds_N)
        .double()
    )
    z_NV = l_NV.double() / sampling.temperature
    kept_NV = s_NV > -math.inf
    enter_NV, leave_NV = _borders(z_NV, kept_NV, sampling)
    rivals = min(RIVALS, l_NV.shape[1])
    rival_NR, at_NR = torch.where(kept_NV, whole_NV, -math.inf).topk(rivals, dim=1)
    gaps_NV = enter_NV
    for place in range(rivals):
        ahead_NV = rival_NR[:, place : place + 1] - whole_NV
        needed_NV = torch.minimum(ahead_NV, leave_NV.gather(1, at_NR[:, place : place + 1]))
        gaps_NV = torch.maximum(gaps_NV, torch.where(ahead_NV > 0, needed_NV, 0.0))
    # A token that a grammar or a list of likeliest ones leaves out has no neighbours, and no change
    # lets it in.
    return torch.where(z_NV > -math.inf, gaps_NV, math.inf) * sampling.temperature


def _borders(
    z_NV: Float64[Tensor, "N V"], kept_NV: Tensor, sampling: Sampling
) -> tuple[Float64[Tensor, "N V"], Float64[Tensor, "N V"]]:
    """Return how far tokens are from being kept, 0 for those that are, and how far from being
    dropped.

    With min-p or top-k beside top-p these are upper bounds: a token that crosses their border moves
    the mass of which top-p is a share, and the border of top-p with it.
    """
    enter_NV = torch.zeros_like(z_NV)
    leave_NV = torch.full_like(z_NV, math.inf)
    left_NV = z_NV > -math.inf
    if sampling.min_p > 0:
        above_NV = z_NV - (z_NV.amax(dim=1, keepdim=True) + math.log(sampling.min_p))
        enter_NV = torch.maximum(enter_NV, -above_NV)
        leave_NV = torch.minimum(leave_NV, above_NV)
        left_NV &= above_NV >= 0
    if 0 < sampling.top_k < z_NV.shape[1]:
        largest = torch.where(left_NV, z_NV, -math.inf).topk(sampling.top_k + 1, dim=1).values
        enter_NV = torch.maximum(enter_NV, largest[:, -2:-1] - z_NV)
        leave_NV = torch.minimum(leave_NV, z_NV - largest[:, -1:])
        left_NV &= z_NV >= largest[:, -2:-1]
    # In log odds of the mass before a token, which move as far as the logits of that mass do.
    if sampling.top_p < 1:
        sorted_NV, order_NV = torch.where(left_NV, z_NV, -math.inf).sort(
            dim=1, descending=True, stable=True
        )
        before_NV = torch.softmax(sorted_NV, dim=1).cumsum(dim=1).roll(1, dims=1)
        before_NV[:, 0] = 0
        odds_NV = torch.logit(before_NV.clamp(0, 1)) - math.log(
            sampling.top_p / (1 - sampling.top_p)
        )
        odds_NV = torch.empty_like(odds_NV).scatter_(1, order_NV, odds_NV)
        last_N1 = torch.where(kept_NV, z_NV, math.inf).amin(dim=1, keepdim=True)
        next_N1 = torch.where(kept_NV, -math.inf, z_NV).amax(dim=1, keepdim=True)
        inside = torch.minimum(-odds_NV, z_NV - next_N1)
        outside = torch.minimum(odds_NV.clamp(min=0), (last_N1 - z_NV).clamp(min=0))
        enter_NV = torch.maximum(enter_NV, torch.where(kept_NV, 0.0, outside))
        leave_NV = torch.minimum(leave_NV, inside)
    return torch.where(kept_NV, 0.0, enter_NV), leave_NV.clamp(min=0)


def _check_top_p(l_NV: Float32[Tensor, "N V"], sampling: Sampling) -> None:
    """Refuse logits of the likeliest tokens alone where the sum of the others may move the border
    of top-p.

    A border that is drawn too near makes tokens impossible that an honest node may take. The others
    have at most the smallest logit of the likeliest, which bounds their sum.
    """
    known_N = (l_NV > -math.inf).sum(dim=1)
    if sampling.greedy or sampling.top_p == 1 or 0 < sampling.top_k < int(known_N.min()):
        return
    sorted_NV = (l_NV.double() / sampling.temperature).sort(dim=1, descending=True).values
    weights_NV = (sorted_NV - sorted_NV[:, :1]).exp()
    weights_NV = torch.where(weights_NV < sampling.min_p, 0.0, weights_NV)
    # The claimed token is given wherever it stands: the last but one bounds those that were not
    # given.
    smallest_N = weights_NV.gather(1, (known_N - 2).clamp(min=0)[:, None])[:, 0]
    others_N = (l_NV.shape[1] - known_N) * smallest_N
    sums_NV = weights_NV.cumsum(dim=1)
    near_N, far_N = (
        (sums_NV < sampling.top_p * total_N[:, None]).sum(dim=1)
        for total_N in (sums_NV[:, -1], sums_NV[:, -1] + others_N)
    )
    if not torch.equal(near_N, far_N):
        raise UsageError(
            f"a response with top_p {sampling.top_p} and temperature {sampling.temperature}, of "
            f"which the engine gave "
            f"{int(known_N.min())} of {l_NV.shape[1]} logits",
            wanted="the logits of all tokens that top-p adds up",
            do="replay it with --engine hf",
        )


def _profiles(gaps_NV: Float[Tensor, "N V"], tokens_N: Tensor) -> Float64[Tensor, "N G"]:
    """Return the profiles of claimed tokens: the law of `assay.stats.token_law`, for devices.

    At small scales only the smallest gaps count. At large ones exp(−gap/σ) is the square of that at
    2σ.
    """
    own_N = gaps_NV.gather(1, tokens_N[:, None])[:, 0].double()
    vocabulary = gaps_NV.shape[1]
    near_NK = gaps_NV.topk(min(_NEAR, vocabulary), dim=1, largest=False).values.double()
    enough = float(near_NK[:, -1].min()) / (math.log(vocabulary) + _NEGLIGIBLE)
    power_NV = torch.exp(-gaps_NV.float() / SCALES[-1])
    columns = []
    for squared, scale in enumerate(SCALES[::-1]):
        if scale <= enough or len(near_NK[0]) == vocabulary:
            total_N = torch.logsumexp(-near_NK / scale, dim=1)
        # Half of the scale squares the powers, which is cheaper than another exponential.
        elif squared < _SQUARINGS:
            total_N = power_NV.sum(dim=1, dtype=torch.float64).log()
            power_NV.square_()
        else:
            total_N = torch.logsumexp(-gaps_NV.double() / scale, dim=1)
        columns.append(-own_N / scale - total_N)
    return torch.stack([*columns[::-1], torch.full_like(own_N, -math.log(vocabulary))], dim=1)


@dataclass(frozen=True, eq=False)
class ReplayedResponse:
    """A receipt with the margins and residuals of its replay.

    Args:
        receipt: Receipt that was replayed.
        margins: Largest score minus that of the claimed token, [N]; empty where tokens say nothing:
            without seeded sampling, or where a grammar forbade tokens that the receipt does not
            name.
        profiles: Log-probability of the claimed tokens at every scale of the noise, [N, G],
            likewise.
        residuals: L2 distances of the sketches, [S]; empty where the engine of one side has none.
    """

    receipt: Receipt
    margins: NDArray[np.float32]
    profiles: NDArray[np.float64]
    residuals: NDArray[np.float64]

    @property
    def matches(self) -> int:
        """Number of tokens that are the verifier's own."""
        return int(np.count_nonzero(self.margins == 0))

    @property
    def blocks(self) -> ResponseBlocks:
        """The evidence, by blocks of 32 tokens."""
        steps = sketch_steps(len(self.receipt.output))
        distances = self.residuals if len(self.residuals) else np.full(len(steps), np.nan)
        return ResponseBlocks.whole(distances, self.profiles)


def replay(
    receipts: Receipts,
    model: Model,
    *,
    requests: Sequence[Request] | None = None,
    adapter: Lora | None = None,
    engine: Prefill | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ReplayedResponse]:
    """Run the responses of receipts again, each by one prefill.

    Args:
        receipts: Receipts of one node and model.
        model: Same checkpoint on this machine; its dtype and device may differ from the node's.
        requests: Requests that were sent, with token ids: prompts of receipts that have their hash
            alone, and what may end an answer that claims ``stop``.
        adapter: LoRA adapter with which the receipts that name one are run.
        engine: Engine that runs them; the transformers engine when None.
        progress: Function that is called with (receipts done, receipts in all) after every receipt.

    Returns:
        One result for every receipt with at least one token, in their order.

    Raises:
        ProofMismatch: The receipts are of another checkpoint, adapter or chat template, a token is
            not in its vocabulary, a response is longer than its positions, the ids of a prompt are
            not known, or an answer to one of the requests claims ``stop`` and has no token or text
            that ends it.
        BadWeights: The model gives NaN or infinity.
        OutOfMemory: The device has no room for a batch.
        UsageError: A request has stop texts, and the model no tokenizer.

    Example:
        >>> import assay
        >>> from assay.poc.responses import replay, respond
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> made = respond(model, ["def add(a, b):"], block_hash="B", public_key="K", max_tokens=8)
        >>> (found,) = replay(made, model)
        >>> found.matches, found.residuals.shape, float(found.residuals[0]) < 1e-3
        (8, (1,), True)
    """
    check_adapter(receipts, adapter)
    wholes = check_runnable(receipts, model, requests=requests)
    check_ends(receipts, model, requests)
    chosen = [receipt for receipt in receipts.receipts if receipt.output]
    engine = engine or HFPrefill(model)
    results: dict[int, ReplayedResponse] = {}
    # An adapter changes every row of a batch, so its responses run by themselves.
    for used in (None, adapter) if adapter is not None else (None,):
        places = [
            place
            for place, answer in enumerate(chosen)
            if (answer.adapter is None) == (used is None)
        ]
        for index, prefilled in (
            engine.run([wholes[place] for place in places], used) if places else ()
        ):
            place = places[index]
            results[place] = _compare(receipts.header, chosen[place], wholes[place], prefilled)
            if progress:
                progress(len(results), len(chosen))
    return [results[place] for place in range(len(chosen))]


def check_runnable(
    receipts: Receipts, model: Model, *, requests: Sequence[Request] | None = None
) -> list[PromptAndOutput]:
    """Return responses that have tokens, with prompt ids; refuse those that do not fit the model.

    :func:`replay` begins with this. To call it before a ledger is begun saves that for receipts
    that are refused.

    Raises:
        ProofMismatch: As :func:`replay`, but for answers that were cut short.
    """
    check_model(receipts.header, model)
    pinned_prompts = [
        Prompt.of(item.ids) for item in requests or () if isinstance(item.prompt, tuple)
    ]
    prompts = {prompt.sha256: prompt for prompt in pinned_prompts}
    own_template = chat_template_digest(model.tokenizer)
    # A prompt of which the client's record has the very ids needs no template.
    stated = {item.chat_template for item in receipts.receipts if item.prompt.sha256 not in prompts}
    for template in stated - {None, own_template}:
        raise ProofMismatch(
            f"prompts that the chat template {template:.12} made",
            wanted=f"the chat template of {model.reference}, "
            f"{own_template[:12] or 'which has none'}",
            do="replay with the tokenizer files that the network agreed on, or pass --requests "
            "with token ids",
        )
    return [_whole(receipt, prompts, model) for receipt in receipts.receipts if receipt.output]


def check_ends(receipts: Receipts, model: Model, requests: Sequence[Request] | None) -> None:
    """Refuse an answer that says ``stop`` and was cut short, or ran on past its end."""
    requests_by_name = {
        sent.name: sent for sent in requests or () if isinstance(sent.prompt, tuple)
    }
    ends = model.end_tokens
    for receipt in receipts.receipts:
        request = requests_by_name.get(receipt.name)
        output = receipt.output
        if request is None or not output:
            continue
        early = output[:-_BESIDE]
        # In both texts: which of them a server looks at, no receipt says.
        past = bool(early) and all(
            request.is_ended(early, ends, model.tokenizer, views=(view,)) for view in VIEWS
        )
        if past or not {*ends, *request.stop_token_ids}.isdisjoint(early):
            raise ProofMismatch(
                (
                    f"request {receipt.request_id!r:.80} with more than {_BESIDE} tokens after "
                    f"its end"
                ),
                wanted="an answer that ends by the first end token or stop",
                do="ask the node for the answer to this request, and list the stop and "
                "stop_token_ids that were sent",
            )
        if receipt.finish == "stop" and not request.is_ended(output, ends, model.tokenizer):
            raise ProofMismatch(
                f"request {receipt.request_id!r:.80} ended by stop after {len(output)} tokens, "
                f"the last {output[-1]}",
                wanted=f"an end token of {model.reference}, or a stop of the request",
                do="ask the node for the whole answer, and list the stop and stop_token_ids that "
                "were sent",
            )


def check_model(header: ReceiptHeader, model: Model) -> None:
    """Refuse receipts of another checkpoint; a ProofMismatch names both."""
    if (header.digest, header.weights) != (model.digest, model.weights):
        raise ProofMismatch(
            f"receipts of {header.reference:.80} ({header.weights}, {header.digest[:12]})",
            wanted=f"receipts of {model.reference} ({model.weights}, {model.digest[:12]})",
            do="replay with the checkpoint that the network agreed on (--model)",
        )


def check_adapter(receipts: Receipts, adapter: Lora | None) -> None:
    """Refuse receipts of another adapter; a ProofMismatch names both."""
    for receipt in receipts.receipts:
        stated = receipt.adapter
        if stated is not None and (adapter is None or stated.digest != adapter.digest):
            raise ProofMismatch(
                f"request {receipt.request_id!r:.80} answered with the adapter {stated.name!r:.80} "
                f"({stated.digest[:12]})",
                wanted="no adapter"
                if adapter is None
                else f"the adapter in {adapter.path} ({adapter.digest[:12]})",
                do="pass --lora to `assay poc replay`, with the directory of that adapter",
            )


def _compare(
    header: ReceiptHeader, receipt: Receipt, tokens: PromptAndOutput, prefilled: Prefilled
) -> ReplayedResponse:
    seed = header.seed(receipt)
    margins = np.zeros(0, np.float32)
    profiles = np.zeros((0, COLUMNS))
    if receipt.sampling is not None and receipt.seeded:
        seeds_N = seed.step_seeds(range(len(tokens.output)))
        margins, profiles = measure_margins(
            prefilled.logits,
            tokens.output,
            receipt.sampling,
            seeds_N,
            prompt=tokens.prompt,
            whole=prefilled.whole,
        )
    residuals = np.zeros(0)
    if len(receipt.sketches):
        steps = sketch_steps(len(tokens.output))
        recomputed = sketch_response(prefilled.sketched, seed.words("sketch"), steps).cpu().numpy()
        residuals = np.linalg.norm(
            receipt.sketches.astype(np.float64) - recomputed.astype(np.float64), axis=1
        )
    return ReplayedResponse(receipt, margins, profiles, residuals)


def _whole(receipt: Receipt, prompts: Mapping[str, Prompt], model: Model) -> PromptAndOutput:
    """Return a response with the ids of its prompt; refuse one that the model cannot run."""
    known_prompt = (
        receipt.prompt if receipt.prompt.ids is not None else prompts.get(receipt.prompt.sha256)
    )
    if known_prompt is None or known_prompt.ids is None:
        raise ProofMismatch(
            f"request {receipt.request_id!r:.80} with the hash of a prompt, "
            f"{receipt.prompt.sha256[:12]}",
            wanted="its token ids: a prefill begins with them",
            do="pass --requests with the prompt that was sent",
        )
    ids = (*known_prompt.ids, *receipt.output)
    biased = () if receipt.sampling is None else receipt.sampling.logit_bias
    vocabulary = model.vocab_size
    positions = model.max_positions
    if (highest := max((*ids, *biased))) >= vocabulary or len(ids) > positions:
        raise ProofMismatch(
            f"request {receipt.request_id!r:.80} with token {highest} and {len(ids)} positions",
            wanted=(
                f"tokens below {vocabulary} and at most {positions} positions, as the model has "
                f"them"
            ),
            do="ask the node for receipts of this model",
        )
    return PromptAndOutput(known_prompt.ids, receipt.output)
