"""Seeded responses of a vLLM server: the tokens of transformers, and the cost beside a server
without them.

`tokens` sends requests of mixed parameters to servers of several settings and answers the same
requests with `respond` on transformers: the receipts must have the same tokens. A replay says how
many tokens match where they differ, as they do in bfloat16. `cost` runs two servers, one with
ASSAY_RESPONSES=seeded and a block, one with neither, and sends both the same load in turns, so that
whatever else the machine does falls on both: tokens a second, and the time between two tokens of a
stream. `audits` draws audits of honest responses that a server of each setting served, replayed by
transformers in float32 and bfloat16 and judged by the stated defaults.

`chat` asks a chat model by OpenAI's client, on the CPU build of vLLM or with `--gpu` on a GPU.
Servers without the plugin, with it, and with it beside a round get the same questions. On a CPU the
logits of 20 questions and their answers stand beside those of transformers, and so does every token
at which answers differ. `assay poc replay` judges receipts under a law of others.

    python research/benchmarks/vllm_responses.py tokens --requests 200
    python research/benchmarks/vllm_responses.py audits --gpu --dtype bfloat16 --settings default v1
    python research/benchmarks/vllm_responses.py tokens --requests 200 --gpu \
      --settings default v1 ngram draft
    python research/benchmarks/vllm_responses.py chat --model DIRECTORY \
      -o research/results/vllm_chat_cpu.json
    python research/benchmarks/vllm_responses.py chat --gpu --settings default v1 \
      --dtype bfloat16 --model DIRECTORY
    python research/benchmarks/vllm_responses.py cost --gpu --model shape:qwen3-0.6b \
      --dtype bfloat16 --at-once 32
"""

import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import httpx
import numpy as np
import torch
from _common import note, parser, publish, round_to
from _vllm import (
    BLOCK,
    NODE,
    ON_GPU,
    REFERENCE,
    SEEDED,
    ForkedServer,
    Server,
    agreement,
    begin,
    mixed,
    receipts_of,
    send_all,
)
from assay_research.responses.field import Ours, share_accused
from responses import AUDITS, TOKENS

from assay import stats
from assay.models import load_model, load_tokenizer, save_random
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.responses import Receipts, Request, Sampling, replay, respond
from assay.poc.responses.response_calibration import bundled_response_noise
from tests.vllm import chatting

DRAFTS = "--speculative-config"
SETTINGS = {  # environment, options
    "default": ({}, {}),
    "v1": ({"VLLM_USE_V2_MODEL_RUNNER": "0"}, {}),
    "ngram": (
        {},
        {DRAFTS: '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}'},
    ),
    "draft": (
        {},
        {
            DRAFTS: '{"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 3}',
            # vLLM 0.32 profiles with a token kept back for every sequence: 1024 of them leave none
            # of 1024.
            "--max-num-seqs": "64",
        },
    ),
}
COMPILED = {"--enforce-eager": False, "--max-num-batched-tokens": "8192", "--max-model-len": "1024"}
SHOWN = 20  # questions whose log probabilities are compared
PLAIN = dict.fromkeys(
    ("--worker-extension-cls", "--enable-prompt-embeds", "--scheduling-policy"), False
)
BUILDS = {
    "bfloat16, compiled": (False, 1),
    "float32, eager": (None, 4),
    "bfloat16, eager": (None, 0),
}
"""Options for --enforce-eager, and requests at once."""


def by_setting(arguments, folder, prepare, measure):
    """Return what a measurement gives for every setting, or why it failed; the servers start side
    by side.
    """
    draft = folder / "draft"
    figures = {}
    shutil.copytree(arguments.model, draft)
    with ExitStack() as ending, ThreadPoolExecutor() as pool:
        servers = {}
        starting = {}
        for name in arguments.settings:
            environment, more = SETTINGS[name]
            options = {option: value.replace("DRAFT", str(draft)) for option, value in more.items()}
            servers[name] = Server(
                folder / name,
                environment=SEEDED | environment,
                options=options_of(arguments) | options,
            )
            ending.callback(servers[name].stop)
            starting[name] = pool.submit(servers[name].start)
        prepared = prepare()
        for name, server in servers.items():
            try:
                starting[name].result()
                begin(server)
                figures[name] = measure(server, *prepared)
            except (AssertionError, RuntimeError, httpx.HTTPError) as error:
                figures[name] = {"failed": str(error)[:1000], "log": failures(server)}
            note(f"{name}: {json.dumps(figures[name])}")
    return figures


def options_of(arguments):
    """Return the options of a server of this model on this device."""
    return {"--model": arguments.model, "--dtype": arguments.dtype} | (
        ON_GPU if arguments.gpu else {}
    )


def failures(server):
    """Return the first lines of a server's log that speak of an error."""
    lines = server.log.read_text(errors="replace").splitlines() if server.log.exists() else []
    return [line[-300:] for line in lines if "Error" in line or "error:" in line][:8]


def tokens(arguments, folder):
    """Return how far servers of all settings agree with transformers."""

    def prepare():
        model = load_model(arguments.model, dtype=arguments.dtype)
        requests = mixed(
            arguments.requests, model.tokenizer, drafts={"ngram", "draft"} & set(arguments.settings)
        )
        return model, requests, respond(model, requests, block_hash=BLOCK, public_key=NODE)

    figures = by_setting(arguments, folder, prepare, agreement)
    return {"requests": arguments.requests, "sketch_every": SKETCH_EVERY, "settings": figures}


def load(count, tokens, **sampling):
    """Return requests for the measurement of cost, with seeds of their own."""
    return [
        Request(
            prompt=tuple(range(100 + number % 50, 164 + number % 50)),
            request_id=f"load-{time.time_ns()}-{number}",
            user_seed=str(number),
            sampling=Sampling(**sampling),
            max_tokens=tokens,
        )
        for number in range(count)
    ]


def measure(server, requests, at_once):
    """Return tokens a second, and the median time between two tokens.

    A piece of a stream may have several tokens, so those that were asked for are counted.
    """
    started = time.perf_counter()
    answers = asyncio.run(
        send_all(server.url, requests, at_once=at_once, stream=True, ignore_eos=True)
    )
    seconds = time.perf_counter() - started
    tokens = sum(request.max_tokens for request in requests)
    gaps = [
        1000 * (b - a)
        for reply in answers
        for a, b in zip(reply["times"][1:], reply["times"][2:], strict=False)
    ]
    assert {reply["status"] for reply in answers} == {200}
    return {"tokens_per_second": tokens / seconds, "gap_ms": statistics.median(gaps)}


def cost(arguments):
    """Return the figures of both servers for every way of sampling and length of answers, turn by
    turn.
    """
    options = options_of(arguments) | (COMPILED if arguments.gpu else {})
    with ExitStack() as ending, ThreadPoolExecutor() as pool:
        servers = {}
        for kind, environment in {"without": {}, "seeded": SEEDED}.items():
            folder = ending.enter_context(tempfile.TemporaryDirectory())
            servers[kind] = Server(folder, environment=environment, options=options)
            ending.callback(servers[kind].stop)
        list(pool.map(Server.start, servers.values()))
        begin(servers["seeded"])
        samplings = [
            {"temperature": arguments.temperature, "top_p": top_p} for top_p in arguments.top_p
        ]
        rows = [
            in_turns(servers, arguments, *cell) for cell in product(samplings, arguments.tokens)
        ]
        return {"ways": rows, "receipts": servers["seeded"].get("/responses").json()["receipts"]}


def in_turns(servers, arguments, sampling, tokens):
    """Return the figures of both servers, turn by turn, for one way of sampling and one length of
    answers.
    """
    rows = []
    for turn in range(arguments.turns + 1):
        order = list(servers) if turn % 2 else list(reversed(servers))
        requests = {kind: load(arguments.requests, tokens, **sampling) for kind in order}
        rows.append(
            {kind: measure(servers[kind], requests[kind], arguments.at_once) for kind in order}
        )
        note(f"{tokens} tokens, turn {turn}: {json.dumps(rows[-1])}")
    turns = rows[1:]  # the first one warms up
    return {
        "sampling": sampling,
        "tokens": tokens,
        "turns": turns,
        **compared(
            "throughput",
            [
                one["seeded"]["tokens_per_second"] / one["without"]["tokens_per_second"]
                for one in turns
            ],
        ),
        **compared("gap", [one["without"]["gap_ms"] / one["seeded"]["gap_ms"] for one in turns]),
        "load": os.getloadavg(),
    }


def compared(name, ratios):
    """Return the median of ratios, and their quartiles."""
    quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios
    return {f"{name}_ratio_median": statistics.median(ratios), f"{name}_ratio_quartiles": quartiles}


def audits(arguments, folder):
    """Return how many audits of honest responses are accused, by setting and by dtype of the
    verifier.
    """

    def prepare():
        models = {
            dtype: load_model(arguments.model, dtype=dtype) for dtype in ("float32", "bfloat16")
        }
        requests = mixed(arguments.requests, models["float32"].tokenizer, tokens=(TOKENS, TOKENS))
        stated = models[arguments.dtype]
        return (
            models,
            requests,
            respond(stated, requests[:1], block_hash=BLOCK, public_key=NODE).header,
        )

    def measure(server, models, requests, header):
        answers = asyncio.run(send_all(server.url, requests, ignore_eos=True))
        assert {reply["status"] for reply in answers} == {200}, answers
        receipts = [receipts_of(server, request.request_id)[0] for request in requests]
        rows = []
        for dtype, model in models.items():
            replays = replay(Receipts.build(header, receipts, 0.0), model, requests=requests)
            row = {
                "verifier": dtype,
                "match": sum(reply.matches for reply in replays) / (TOKENS * len(replays)),
            }
            noise = bundled_response_noise(header.digest, arguments.dtype, dtype)
            row["accused"] = share_accused(Ours(noise).audited(replays, AUDITS))
            rows.append(row)
        return rows

    figures = by_setting(arguments, folder, prepare, measure)
    return {"requests": arguments.requests, "audits": AUDITS, "settings": figures}


def apart(wanted, found, tokenizer):
    """Return how far log probabilities are from those of float32, and where answers first differ
    from its answers.

    The divergence is that of the likeliest tokens and of all others together.
    """
    rows = []
    differences = []
    for number, of_question in enumerate(found[2]):
        for sure, row in zip(wanted[2][number], of_question, strict=True):
            ids = (
                torch.tensor(list(row)) if isinstance(row, dict) else row.topk(chatting.TOP).indices
            )
            ours, theirs = (
                x.double() for x in (torch.tensor([row[i] for i in ids.tolist()]), sure[ids])
            )
            tails = [(1 - x.exp().sum()).clamp(min=1e-12) for x in (theirs, ours)]
            kl = (theirs.exp() * (theirs - ours)).sum() + tails[0] * (tails[0] / tails[1]).log()
            first, second = ours.topk(2).values
            moved = (theirs - ours).abs()[ours.topk(20).indices].max()
            rows.append(
                (
                    number,
                    float(kl),
                    float(moved),
                    ids[ours.argmax()] != sure.argmax(),
                    first == second,
                )
            )
        a = wanted[0][number]
        b = found[0][number]
        if a != b:
            at = next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
            margins = [
                float(x[number][at][a[at]] - x[number][at][b[at]]) for x in (wanted[1], found[1])
            ]
            one = {
                "question": number,
                "at": at,
                "float32": tokenizer.decode(a[at]),
                "here": tokenizer.decode(b[at]),
            }
            differences.append(
                one
                | {"margin_of_float32": round_to(margins[0]), "margin_here": round_to(margins[1])}
            )
    groups, kl, moved, others, tied = np.array(rows, dtype=float).T
    interval = stats.group_bootstrap(np.median, [kl], [groups])
    return {
        "positions": len(kl),
        "kl_median": [round_to(x) for x in (interval.value, interval.low, interval.high)],
        "kl_max": round_to(kl.max()),
        "moved": [round_to(x) for x in (np.median(moved), moved.max())],
        "other_token": round_to(others.mean()),
        "tied": round_to(tied.mean()),
        "different_answers": len(differences),
        "differences": differences,
    }


def beside_a_round(server, asked, at_once, alone):
    """Return how many answers are the same with the plugin, and while it computes nonces."""
    answers = chatting.tokens_of(server, asked, at_once)
    row = {"same_with_the_plugin": chatting.same(alone, answers)}
    row["others"] = [
        reply for reply in zip(asked, alone, answers, strict=True) if reply[1] != reply[2]
    ]
    server.begin("beside")
    before = server.wait_for(8)
    row["same_beside_a_round"] = chatting.same(alone, chatting.tokens_of(server, asked, at_once))
    row["nonces_meanwhile"] = server.checked() - before
    server.post("/stop").raise_for_status()
    return row


def chat_on_gpu(arguments, root):
    """Return the same of a GPU, whose servers have one dtype and prompt embeddings, by setting.

    Kernels are chosen by time: both servers of a pair have the same. In the first pair the plain
    server multiplies float32 as exactly as the one with the plugin does, in the second as vLLM has
    it.
    """
    asked = chatting.questions(arguments.requests)
    figures = {}
    first = []
    ways = (
        (1, 4) if arguments.dtype == "float32" else (1,)
    )  # at once, so that the batches of bfloat16 are equal
    options = (
        options_of(arguments)
        | COMPILED
        | {"--chat-template": False, "--enable-prompt-embeds": None}
    )
    for name, turn in product(arguments.settings, ("exact", "compiled")):
        folder = root / f"{name}-{turn}"
        own = SETTINGS[name][0] | {
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_USE_AOT_COMPILE": "0",
        }
        kernels = {"--compilation-config": json.dumps({"cache_dir": str(folder / "kernels")})}
        plain = (
            own | {"VLLM_PLUGINS": ""} | ({"TRITON_F32_DEFAULT": "ieee"} if turn == "exact" else {})
        )
        with Server(
            folder / "plain", environment=plain, options=PLAIN | options | kernels
        ) as server:
            alone = [chatting.tokens_of(server, asked, setting) for setting in ways]
        first = first or alone
        with Server(
            folder / "plugin", environment=SEEDED | own, options=options | kernels
        ) as server:
            for setting, answers, before in zip(ways, alone, first, strict=True):
                row = figures[f"{name}, {turn}, {setting} at once"] = beside_a_round(
                    server, asked, setting, answers
                )
                row["same_as_first_plain"] = chatting.same(before, answers)
                note(f"{name}, {turn}, {setting} at once: {json.dumps(row)}")
    return {"requests": len(asked), "tokens": chatting.ANSWER, "servers": figures}


def chat(arguments, root):
    """Return the figures of all builds of a chat model, one server at a time."""
    asked = chatting.questions(arguments.requests)
    tokenizer = load_tokenizer(arguments.model)
    prompts = chatting.prompts_of(asked[:SHOWN], tokenizer)
    wanted = chatting.of_transformers(arguments.model, "float32", "eager", prompts)
    figures = {
        "requests": len(asked),
        "tokens": chatting.ANSWER,
        "logits": (logits := {}),
        "servers": (servers := {}),
    }
    for dtype, attention in (("float32", "sdpa"), ("bfloat16", "eager"), ("bfloat16", "sdpa")):
        outputs = chatting.of_transformers(arguments.model, dtype, attention, prompts, wanted[0])
        logits[f"transformers, {dtype}, {attention}"] = apart(wanted, outputs, tokenizer)
    for build, (eager, at_once) in BUILDS.items():
        folder = root / build.replace(", ", "-")
        start = Server if eager is False else ForkedServer
        options = {
            "--model": str(Path(arguments.model).absolute()),
            "--dtype": build.partition(",")[0],
        }
        options |= {
            "--enforce-eager": eager,
            "--chat-template": False,
            "--max-logprobs": str(chatting.TOP),
        }
        with start(
            folder / "plain", environment={"VLLM_PLUGINS": ""}, options=options | PLAIN
        ) as server:
            outputs = chatting.of_server(server, asked[:SHOWN], prompts, wanted[0])
            logits[f"vllm, {build}"] = apart(wanted, outputs, tokenizer)
            alone, again = (
                chatting.tokens_of(server, asked, at_once) if at_once else [] for _ in range(2)
            )
        if not at_once:
            continue
        row = servers[build] = {"at_once": at_once, "same_again": chatting.same(alone, again)}
        without = {"--enable-prompt-embeds": False}  # with it vLLM compiles another graph
        ways = {
            "with_the_flags_alone": ({"VLLM_PLUGINS": ""}, {}),
            "without_prompt_embeds": (SEEDED, without),
        }
        for setting, (environment, more) in ways.items():
            with start(folder / setting, environment=environment, options=options | more) as server:
                row[f"same_{setting}"] = chatting.same(
                    alone, chatting.tokens_of(server, asked, at_once)
                )
        with start(folder / "plugin", environment=SEEDED, options=options) as server:
            row |= beside_a_round(server, asked, at_once, alone)
            if "bfloat16" in build:
                begin(server)
                row["replay"] = chatting.judged(
                    server, asked[: chatting.RECEIPTS], folder, arguments.model
                )
        publish("vllm_responses_chat", figures, arguments.output)
    return figures


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("part", choices=("tokens", "audits", "chat", "cost"))
    options_parser.add_argument("--requests", type=int, default=200, help="of each turn")
    options_parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64], help="of an answer, for cost"
    )
    options_parser.add_argument("--turns", type=int, default=6)
    options_parser.add_argument("--at-once", type=int, default=8)
    options_parser.add_argument("--temperature", type=float, default=1.0)
    options_parser.add_argument("--top-p", type=float, nargs="+", default=[1.0])
    options_parser.add_argument("--model", default=str(REFERENCE))
    options_parser.add_argument("--dtype", default="float32")
    options_parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=["default"],
        help="of servers, for tokens",
    )
    options_parser.add_argument(
        "--gpu", action="store_true", help="servers on a GPU: compiled layers and graphs, for cost"
    )
    arguments = options_parser.parse_args()
    figures = {
        "part": arguments.part,
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model.startswith(
            "shape:"
        ):  # vLLM needs a checkpoint, and a tokenizer for its streams
            options_parser = save_random(
                arguments.model, Path(folder) / "made", weights="random-all", dtype=arguments.dtype
            )
            for file in REFERENCE.glob("tokenizer*"):
                shutil.copy(file, options_parser)
            arguments.model = str(options_parser)
        if arguments.part == "tokens":
            figures |= tokens(arguments, Path(folder))
        elif arguments.part == "audits":
            figures |= audits(arguments, Path(folder))
        elif arguments.part == "chat":
            figures |= (chat_on_gpu if arguments.gpu else chat)(arguments, Path(folder))
        else:
            figures |= {"at_once": arguments.at_once} | cost(arguments)
    publish(f"vllm_responses_{arguments.part}", figures, arguments.output)


if __name__ == "__main__":
    main()
