"""Questions for a chat model in its own template, asked by OpenAI's client, and the receipts of
their answers.
"""

import asyncio
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _vllm import BLOCK, MODEL, NODE, Server

from assay.models import load_model, read_chat
from assay.models.chat import render_chat
from assay.poc.responses import Receipts

FORMS = (
    "Explain {} in one sentence.",
    "List three facts about {}.",
    "Why do people like {}?",
    "Who invented {}?",
)
FORMS += (
    "Tell a child about {}.",
    "What is {}?",
    "Translate {} into French.",
    "Write a haiku about {}.",
)
FORMS += (
    "Where does {} come from?",
    "How much is known about {}?",
    "What should I never do with {}?",
)
THINGS = (
    "numbers music sleep trees coffee money France Japan bicycles violins paper chess iron rain "
    "cats bread ice ink"
)
ANSWER = 8
TOP = 100
"""Tokens of an answer at most, and those of a position whose log probabilities a server tells."""
RECEIPTS = 96
RECEIPT = 32
WARM = 0.8
"""Questions whose receipts are judged, tokens of such an answer at most, and its temperature."""


def questions(count: int) -> list[str]:
    """Return different questions: two capitals, then a fixed draw."""
    made = [form.format(thing) for form, thing in product(FORMS, THINGS.split())]
    return [
        "What is the capital of France?",
        "What is the capital of Italy?",
        *random.Random(0).sample(made, count - 2),
    ]


def prompts_of(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of questions in the chat template."""
    chats = [
        render_chat(read_chat([{"role": "user", "content": text}]), tokenizer) for text in texts
    ]
    return [list(ids) for ids in tokenizer(chats, add_special_tokens=False)["input_ids"]]


def ask(
    url: str, texts: list[str], *, model: str, tokens: int, at_once: int = 4, **options: Any
) -> list[Any]:
    """Return the first choice of each answer, with its ``token_ids``; request ids count from
    ``chat-0``.
    """
    from openai import AsyncOpenAI

    options = {"temperature": 0, "max_completion_tokens": tokens} | options

    async def all_of_them() -> list[Any]:
        gate = asyncio.Semaphore(at_once)

        async def one(number: int) -> Any:
            async with gate:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": texts[number]}],
                    extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
                    extra_headers={"X-Request-Id": f"chat-{number}"},
                    **options,
                )
            return answer.choices[0]

        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=240.0
        ) as client:
            return await asyncio.gather(*map(one, range(len(texts))))

    return asyncio.run(all_of_them())


def tokens_of(server: Server, asked: list[str], at_once: int) -> list[list[int]]:
    """Return the greedy answers of a server."""
    return [
        one.token_ids for one in ask(server.url, asked, model=MODEL, tokens=ANSWER, at_once=at_once)
    ]


def same(some: list[list[int]], others: list[list[int]]) -> int:
    """Return how many answers are the same."""
    return sum(one == other for one, other in zip(some, others, strict=True))


def of_transformers(
    model: str,
    dtype: str,
    attention: str,
    prompts: list[list[int]],
    given: list[list[int]] | None = None,
) -> tuple[list[list[int]], list[Any], list[Any]]:
    """Return greedy answers with the log probabilities of their steps, and those of prompts with
    the answers given.
    """
    network = load_model(model, dtype=dtype, device="cpu").module
    network.set_attn_implementation(attention)
    greedy = {
        "max_new_tokens": ANSWER,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.inference_mode():
        made = [network.generate(torch.tensor([prompt]), **greedy) for prompt in prompts]
        answers = [
            one.sequences[0, len(prompt) :].tolist()
            for one, prompt in zip(made, prompts, strict=True)
        ]
        whole = [prompt + ids for prompt, ids in zip(prompts, given or answers, strict=True)]
        read = [
            network(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in whole
        ]
    return answers, [torch.cat(one.logits).float().log_softmax(-1) for one in made], read


def of_server(
    server: Server, asked: list[str], prompts: list[list[int]], given: list[list[int]]
) -> tuple[list[list[int]], list[Any], list[Any]]:
    """Return the same of a server, whose log probabilities are those of its likeliest tokens, by
    token.
    """
    told = ask(
        server.url, asked, model=MODEL, tokens=ANSWER, at_once=1, logprobs=True, top_logprobs=TOP
    )
    steps = [
        [
            {int(top.token[9:]): top.logprob for top in at.top_logprobs}
            for at in one.logprobs.content
        ]
        for one in told
    ]
    read = []
    for prompt, ids in zip(prompts, given, strict=True):
        body = {"model": MODEL, "prompt": prompt + ids, "max_tokens": 1, "prompt_logprobs": TOP}
        rows = server.client.post("/v1/completions", json=body).json()["choices"][0][
            "prompt_logprobs"
        ][1:]
        read.append([{int(token): one["logprob"] for token, one in row.items()} for row in rows])
    return [one.token_ids for one in told], steps, read


def judged(server: Server, asked: list[str], folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """Return what the command line says of receipts of a server that has a block, by format of the
    verifier.

    The law is that of every second receipt, and the verdict that of the others.
    """
    ask(server.url, asked, model=MODEL, tokens=RECEIPT, temperature=WARM)
    (folder / "all").write_bytes(
        server.client.get("/api/v1/receipts.jsonl?after=0&limit=1000").content
    )
    receipts = Receipts.load(folder / "all")
    for part in (0, 1):
        some = receipts.receipts[part::2]
        Receipts.build(receipts.header, some, 1.0).save(folder / f"part-{part}")
        lines = []
        for name in (one.request_id for one in some):
            message = {"role": "user", "content": asked[int(name.removeprefix("chat-"))]}
            sent = {
                "messages": [message],
                "request_id": name,
                "temperature": WARM,
                "max_tokens": RECEIPT,
            }
            lines.append(json.dumps(sent) + "\n")
        (folder / f"sent-{part}").write_text("".join(lines))

    def call(command: str, *words: object) -> dict[str, Any]:
        shared = ["--model", model, "--config", str(folder / "settings"), "--json"]
        line = [sys.executable, "-m", "assay", "poc", command, *map(str, words), *shared]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return json.loads(done.stdout or json.dumps({"failed": done.stderr[:1000]})) | {
            "code": done.returncode
        }

    verdicts = {}
    for dtype in ("float32", "bfloat16"):
        settings = [
            f'[poc.{command}]\ndtype = "{dtype}"\n' for command in ("replay", "calibrate-responses")
        ]
        (folder / "settings").write_text("".join(settings))
        call(
            "calibrate-responses",
            folder / "part-0",
            "--requests",
            folder / "sent-0",
            "--output",
            folder / "law",
        )
        stated = ("--requests", folder / "sent-1", "--block-hash", BLOCK, "--public-key", NODE)
        verdicts[dtype] = call(
            "replay", folder / "part-1", "--calibration", folder / "law", *stated
        )
    return verdicts
