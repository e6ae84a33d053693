"""GenerationOptions of completions, with the log-probabilities that they were sampled with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack, cast

import torch
from torch.nn.utils.rnn import pad_sequence

from assay.errors import ModelError, UsageError
from assay.models.catalogue import ModelInfo, model_info
from assay.models.load import load_tokenizer, plain_generation
from assay.models.model import Model, Tokenizer
from assay.models.precision import own_precision
from assay.models.shared_passes import check_one_kind
from assay.models.spelling import encode_prompt
from assay.models.token_text import check_tokens, decode_tokens
from assay.streams.definition import seed32
from assay.vhack.training.pool import PoolRollout, RolloutPool


def sample_pool(
    teacher: Model,
    prompts: Sequence[str],
    *,
    per_prompt: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch: int = 32,
) -> RolloutPool:
    """Sample a pool from a teacher, with the log-probabilities it really sampled with.

    Choose among it afterwards, for instance what cheats: ``RolloutPool([r for r in pool if …])``.

    Args:
        teacher: Model with the tokenizer of the one that will be trained.
        prompts: Prompts to complete.
        per_prompt: Completions of each prompt.
        temperature: Temperature of sampling; nothing is cut off the distribution.
        max_new_tokens: Longest completion in tokens.
        seed: Seed of sampling.
        batch: Completions at once; other batches give other completions.

    Raises:
        UsageError: A number is not positive, the teacher has no tokenizer, a prompt has no token,
            or a prompt with its completion is longer than the context.
    """
    if not all(number > 0 for number in (per_prompt, temperature, max_new_tokens, batch)):
        raise UsageError(
            f"per_prompt={per_prompt}, temperature={temperature}, "
            f"max_new_tokens={max_new_tokens}, batch={batch}",
            wanted="positive numbers",
            do="leave one out to have its default",
        )
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    ids = encode_prompts(teacher, repeated, max_new_tokens)
    options = GenerationOptions(
        temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, batch=batch
    )
    return RolloutPool(
        [rollout for part in sample_batches(teacher, repeated, ids, **options) for rollout in part]
    )


class GenerationOptions(TypedDict):
    """How completions are sampled, see `sample_pool`."""

    temperature: float
    max_new_tokens: int
    seed: int
    batch: int


def find_end_tokens(model: Model) -> list[int]:
    """Return the tokens that end a completion, in order.

    Raises:
        UsageError: The model has no tokenizer, or no such token.
    """
    if model.tokenizer is None or not model.end_tokens:
        missing = "a tokenizer" if model.tokenizer is None else "a token that ends a text"
        raise _cannot_complete(model.reference, missing)
    return sorted(model.end_tokens)


def _cannot_complete(reference: str, missing: str) -> UsageError:
    return UsageError(
        f"{reference} without {missing}",
        wanted="a model with a tokenizer that has an eos_token",
        do="name the token in its tokenizer_config.json, or choose another --model",
    )


def encode_prompts(
    model: Model | str, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of prompts for a model, or for one whose weights were not read.

    Raises:
        UsageError: As of :func:`find_end_tokens`, or a prompt has no token, or with its completion
            is longer than the model's context.
        ModelError: There is no such model, or its configuration or tokenizer cannot be used.
    """
    description: ModelInfo | Model = model_info(model) if isinstance(model, str) else model
    tokenizer = load_tokenizer(model) if isinstance(model, str) else model.tokenizer
    if tokenizer is None:
        raise _cannot_complete(description.reference, "a tokenizer")
    if not isinstance(model, str):
        find_end_tokens(model)
    ids = {prompt: encode_prompt(tokenizer, prompt) for prompt in set(prompts)}
    for prompt, tokens in ids.items():
        if not tokens:
            raise UsageError(
                f"the prompt {prompt!r:.80}, which has no token",
                wanted="a text that a completion can go on from",
                do="leave it out",
            )
        check_tokens("a prompt", tokens, description.vocab_size)
    longest = max(map(len, ids.values()), default=0)
    if longest + max_new_tokens > description.max_positions:
        raise UsageError(
            f"prompts of up to {longest} tokens and {max_new_tokens} new ones",
            wanted=f"at most {description.max_positions}, the context of the model",
            do="allow fewer with --max-new-tokens (max_new_tokens), or take shorter prompts",
        )
    return [ids[prompt] for prompt in prompts]


@contextmanager
def finite_sampling(do: str) -> Iterator[None]:
    """Refuse a model whose logits are not finite, in place of torch's error, with what to do."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error) and "device-side assert" not in str(error):
            raise
        raise ModelError(
            "a model whose next-token probabilities are not finite", wanted="finite ones", do=do
        ) from error


def sample_batches(
    model: Model,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    first: int = 0,
    **options: Unpack[GenerationOptions],
) -> Iterator[list[PoolRollout]]:
    """Yield one completion of each prompt, given its tokens, a batch at a time.

    Each batch has random numbers of its own, so that those from ``first`` on, a multiple of the
    batch, are the same without those before it.
    """
    if lengths := [len(row) for row in ids[first:]]:
        check_one_kind(model.config, min(lengths), max(lengths) + options["max_new_tokens"])
    for start in range(first, len(prompts), options["batch"]):
        part = slice(start, start + options["batch"])
        yield _sample_batch(
            model, prompts[part], ids[part], seed32(f"samples {options['seed']} {start}"), options
        )


@torch.no_grad()
def _sample_batch(
    model: Model,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    seed: int,
    options: GenerationOptions,
) -> list[PoolRollout]:
    tokenizer = cast("Tokenizer", model.tokenizer)
    module = cast(Any, model.module)
    ends = find_end_tokens(model)
    padding = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else ends[0]
    rows = [torch.tensor(row, device=model.device) for row in ids]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
    mask_BT = pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
    )
    devices = [model.device] if model.device.type == "cuda" else []
    finite = finite_sampling("take weights that compute finite numbers")
    # Unset options would be taken from the checkpoint's own.
    plain = plain_generation(module)
    with torch.random.fork_rng(devices=devices), finite, plain, own_precision(model):
        torch.manual_seed(seed)
        generated = module.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=options["max_new_tokens"],
            do_sample=True,
            temperature=options["temperature"],
            top_k=0,
            top_p=1.0,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=padding,
            eos_token_id=ends,
        )
    logprobs_BT = module.compute_transition_scores(
        generated.sequences, generated.scores, normalize_logits=True
    )
    tokens_BT = generated.sequences[:, ids_BT.shape[1] :]
    rollouts = []
    for prompt, encoded, tokens, logprobs in zip(
        prompts, ids, tokens_BT.tolist(), logprobs_BT.tolist(), strict=True
    ):
        length = next((step for step, token in enumerate(tokens, 1) if token in ends), len(tokens))
        completion = decode_tokens(
            tokenizer, tokens[:length], before=encoded, skip_special_tokens=True
        )
        rollouts.append(
            PoolRollout(prompt, completion, tuple(tokens[:length]), tuple(logprobs[:length]))
        )
    return rollouts
