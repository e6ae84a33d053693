"""From samples to token ids, and from token ids to micro-batches that fit into memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.models.chat import Chat, chat_template_digest, render_chat
from assay.models.decoder import mlp_width
from assay.models.model import AnyModel, AnyTokenizer, PreTrained, Tokenizer
from assay.models.shared_passes import pass_kind
from assay.models.spelling import encode_texts
from assay.models.token_text import check_tokens
from assay.vhack.pairs.pairs import Pair, Sample

# Larger batches than this are no faster on an H200, and slower on a CPU, whose caches they leave.
_MOST_TOKENS = {"cuda": 16384, "cpu": 2048}
# On a CPU no batch is faster for more, and other programs want the memory.
_MOST_BYTES = {"cuda": 52e9, "cpu": 1e9}
# Kept for the backward pass per token and layer, in widths: residuals, norms, q, k, v, attention
# output, and in the MLP gate, up, their activation and product. Measured peaks stay below.
_HIDDEN_COPIES = 10
_WIDE_COPIES = 5
# The logits of a completion token live once in the model's dtype and about three times in float32.
_LOGIT_BYTES = 16
# Names of the context length in the configurations of most models, MPT, and Whisper.
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_target_positions")


Progress = Callable[[int, int], None]
"""A function that is called with the number of steps done and of all."""


def stage_progress(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return the progress of a stage that begins after ``before`` of ``total`` steps."""
    return None if progress is None else lambda steps, _: progress(before + steps, total)


@dataclass(frozen=True)
class Encoded:
    """Sample as token ids that spell prompt and completion, see :func:`encode_texts`."""

    index: int  # in the list of samples
    name: str  # in errors
    ids: list[int]
    n_prompt: int

    @property
    def completion(self) -> tuple[int, int]:
        """Start and end of the completion."""
        return self.n_prompt, len(self.ids)


@dataclass(frozen=True, eq=False)
class Segments:
    """Samples end to end: sample b has the rows ``bounds[b][0]`` to ``bounds[b][1]``.

    There are no other rows.
    """

    bounds: tuple[tuple[int, int], ...]
    offsets: Tensor  # the bounds on the device, [B + 1] int64

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        """Return the segments of samples with so many rows each."""
        ends = [0, *accumulate(lengths)]
        return cls(tuple(pairwise(ends)), torch.tensor(ends).to(device))

    @property
    def longest(self) -> int:
        """Number of rows of the longest sample, T."""
        return max(end - start for start, end in self.bounds)

    @cached_property
    def padded_places(self) -> Tensor:
        """Place of each row, [N], among B·T where every sample is padded to T rows."""
        inside_BT = (
            torch.arange(self.longest, device=self.offsets.device) < self.offsets.diff()[:, None]
        )
        return inside_BT.flatten().nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Samples in one forward pass.

    Shapes: N rows in all, B samples, T tokens, M completion tokens of all samples.

    Packed, they stand end to end in one row, each with its own positions. Otherwise they are padded
    on the right to one length. With causal attention no token sees what stands to its right, so
    padding needs no mask, and its gradient is exactly zero.
    """

    encoded: list[Encoded]
    ids: Tensor  # [1, N] packed or [B, T] padded
    positions: Tensor | None  # of each token in its sample, [1, N]; None if padded
    segments: Segments  # of the samples among the N rows of all tokens
    label_segments: Segments  # of the samples among the M rows that predict a completion token
    label_rows: Tensor  # numbers of those rows among the N, [M]
    labels: Tensor  # token that each of these rows should predict, [M]
    loss_weights: Tensor  # one over the number of completion tokens of the sample, [M] float32

    @cached_property
    def sample(self) -> Tensor:
        """Number of the sample that each row belongs to, [N]."""
        return torch.repeat_interleave(self.segments.offsets.diff())

    @cached_property
    def is_token(self) -> Tensor:
        """Whether each row is a token and not padding, [N]."""
        rows = torch.arange(self.ids.numel(), device=self.ids.device)
        lengths = torch.tensor([len(encoded.ids) for encoded in self.encoded]).to(self.ids.device)
        return rows - self.segments.offsets[self.sample] < lengths[self.sample]

    @classmethod
    def build(cls, encoded: list[Encoded], device: torch.device, *, packed: bool) -> "SampleBatch":
        """Return the batch of these samples on a device."""
        lengths = [len(sample.ids) for sample in encoded]
        sizes = lengths if packed else [max(lengths)] * len(lengths)
        counts = torch.tensor([len(sample.ids) - sample.n_prompt for sample in encoded])
        segments = Segments.of(sizes, device)
        spans = [
            (start + sample.n_prompt - 1, start + len(sample.ids) - 1)
            for (start, _), sample in zip(segments.bounds, encoded, strict=True)
        ]
        ids = torch.tensor(
            [
                token
                for sample, size in zip(encoded, sizes, strict=True)
                for token in sample.ids + [0] * (size - len(sample.ids))
            ]
        )
        return cls(
            encoded,
            ids.view(1 if packed else len(encoded), -1).to(device),
            torch.cat([torch.arange(size) for size in sizes])[None].to(device) if packed else None,
            segments,
            Segments.of(counts.tolist(), device),
            torch.tensor([row for span in spans for row in range(*span)]).to(device),
            torch.tensor(
                [token for sample in encoded for token in sample.ids[sample.n_prompt :]]
            ).to(device),
            counts.to(torch.float32).reciprocal().repeat_interleave(counts).to(device),
        )


def encode(
    tokenizer: AnyTokenizer,
    samples: Sequence[Sample],
    names: Sequence[str],
    longest: int | None,
    rows: int | None = None,
) -> list[Encoded]:
    """Tokenise samples; refuse by name empty ones and those of more than ``longest`` tokens.

    A text that the tokenizer cannot spell is refused too, and a token that the embeddings, of so
    many ``rows``, do not have.
    """
    if tokenizer is None:
        raise UsageError(
            "a model without a tokenizer",
            wanted="text needs one",
            do="pass the tokenizer of the model",
        )
    if not samples:
        raise UsageError("no samples", wanted="at least one", do="pass some")
    texts = []
    for name, sample in zip(names, samples, strict=True):
        with _named_errors(name):
            texts.append(_as_text(sample, tokenizer))
    encodings = encode_texts(tokenizer, texts)
    encoded = []
    for index, name in enumerate(names):
        with _named_errors(name):
            ids, n_prompt = next(encodings)
        for part, count in (("prompt", n_prompt), ("completion", len(ids) - n_prompt)):
            if not count:
                raise DataError(
                    f"{name}: empty {part}",
                    wanted="text that gives at least one token",
                    do="leave it out",
                )
        if longest is not None and len(ids) > longest:
            raise DataError(
                f"{name}: {n_prompt} tokens of prompt and {len(ids) - n_prompt} of completion",
                wanted=f"at most {longest} tokens together, the context of the model",
                do="shorten or leave it out; a cut sample would measure something else",
            )
        if rows is not None:
            check_tokens(name, ids, rows)
        encoded.append(Encoded(index, name, ids, n_prompt))
    return encoded


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn errors of use into errors of the data called ``name``."""
    try:
        yield
    except UsageError as error:
        raise DataError(f"{name}: {error.seen}", wanted=error.wanted, do=error.do) from None


def _as_text(sample: Sample, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return prompt and completion as text, of messages by the chat template of the tokenizer."""
    prompt = sample.prompt
    answer = sample.completion
    if isinstance(prompt, str):
        if isinstance(answer, str):
            return prompt, answer
        raise UsageError(
            "a message after a text", wanted="messages in both", do="write both as text"
        )
    if not isinstance(answer, str):
        answer = render_chat(prompt, tokenizer, answer=answer)
    return render_chat(prompt, tokenizer), answer


def find_chat_template(
    samples: Iterable[Sample | Pair], model: AnyModel, tokenizer: AnyTokenizer
) -> str:
    """Return the digest of the template that renders samples; empty if none has messages."""
    chats = any(isinstance(sample.prompt, Chat) for sample in samples)
    return chat_template_digest(tokenizer or getattr(model, "tokenizer", None)) if chats else ""


def context_length(module: PreTrained) -> int | None:
    """Return how many tokens a model is made for, or None where its configuration does not say."""
    config = module.config.get_text_config()
    return next(
        (int(getattr(config, name)) for name in _CONTEXTS if getattr(config, name, 0)), None
    )


def plan_batches(
    encoded: Sequence[Encoded], max_tokens: int, module: PreTrained, *, packed: bool
) -> list[list[Encoded]]:
    """Return the samples in batches of at most ``max_tokens`` of a model.

    A sample longer than that has a batch of its own.

    Padding counts as tokens, unless the samples will be packed. The longest samples come first.
    The samples of a batch may share a pass of the model (:mod:`assay.models.shared_passes`).
    """
    ordered = sorted(encoded, key=lambda sample: (-len(sample.ids), sample.index))
    config = module.config.get_text_config()
    batches: list[list[Encoded]] = []
    for _, alike in groupby(ordered, key=lambda sample: pass_kind(config, len(sample.ids))):
        batch_tokens = max_tokens
        for sample in alike:
            size = len(sample.ids) if packed or not batches else len(batches[-1][0].ids)
            if batch_tokens + size <= max_tokens:
                batches[-1].append(sample)
                batch_tokens += size
            else:
                batches.append([sample])
                batch_tokens = len(sample.ids)
    return batches


def room_for_batches(free: float, device: str) -> float:
    """Return the bytes that concurrent batches may take together, of so many free."""
    return min(_MOST_BYTES[device], free / 2)


def token_budget(
    module: PreTrained, encoded: Sequence[Encoded], room: float, *, checkpointing: bool
) -> int:
    """Return how many tokens a batch may have, padding included, to fit into its bytes.

    With checkpointing every layer is computed again in the backward pass.
    """
    config = module.config.get_text_config()
    layers = int(config.num_hidden_layers)
    parameter = next(module.parameters())
    wide = mlp_width(config) or 4 * config.hidden_size
    layer = (_HIDDEN_COPIES * config.hidden_size + _WIDE_COPIES * wide) * parameter.element_size()
    # A layer that is computed again has its input all the time, and everything else once its turn
    # comes.
    states = layers * config.hidden_size * parameter.element_size()
    activations = layer + states if checkpointing else layer * layers
    completion_share = sum(len(sample.ids) - sample.n_prompt for sample in encoded) / sum(
        len(sample.ids) for sample in encoded
    )
    per_token = activations + completion_share * config.vocab_size * _LOGIT_BYTES
    return max(1, min(_MOST_TOKENS.get(parameter.device.type, 2048), int(room / per_token)))
