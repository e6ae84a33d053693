"""Settings of ``assay poc respond``; the defaults of sampling are those of ``Sampling``."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from assay.cli.flags import BLOCK_HASH, DTYPE, MODEL, OUTPUT, PUBLIC_KEY
from assay.cli.poc_settings import NUMBER_FORMAT, NumberFormat
from assay.poc.responses.requests import DEFAULT_MAX_TOKENS
from assay.poc.responses.sampling import Sampling
from assay.settings import Device, Settings


class RespondSettings(Settings):
    """Settings of ``assay poc respond``."""

    model: Annotated[str, MODEL] = Field(description="Model: a directory, a hub id, reference:… or shape:…")
    prompts: Path = Field(description="JSON Lines with prompt, and what a line sets for itself.")
    block_hash: Annotated[str, BLOCK_HASH] = Field(
        description="Block that became known after the requests were accepted."
    )
    public_key: Annotated[str, PUBLIC_KEY] = Field(description="Key of the node.")
    output: Annotated[Path, OUTPUT] = Field(description="File of receipts to write.")
    user_seed: str = Field("", description="Seed of the client, for prompts that have none.")
    temperature: float = Field(Sampling.temperature, description="Divisor of the logits; 0 takes the likeliest token.")
    top_k: int = Field(Sampling.top_k, description="Number of likeliest tokens to keep; 0 keeps all.")
    top_p: float = Field(Sampling.top_p, description="Probability that the kept tokens have together at least.")
    min_p: float = Field(
        Sampling.min_p, description="Probability of a kept token at least, relative to the likeliest one."
    )
    repetition_penalty: float = Field(
        Sampling.repetition_penalty, description="Divisor of positive logits of tokens in prompt or output."
    )
    frequency_penalty: float = Field(
        Sampling.frequency_penalty, description="Number subtracted from a logit for every time the token was made."
    )
    presence_penalty: float = Field(
        Sampling.presence_penalty, description="Number subtracted from a logit if the token was made."
    )
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1, description="Number of tokens after which a response ends.")
    hash_prompts: bool = Field(False, description="Write the hash of a prompt in place of its token ids.")
    dtype: Annotated[NumberFormat | None, DTYPE] = Field(None, description=f"{NUMBER_FORMAT}.")
    device: Device = None
    overwrite: bool = Field(False, description="Replace an existing file of receipts.")
