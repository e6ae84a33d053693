"""Replay of responses: what honest tokens and sketches look like, who is accused, and when 4-bit
weights are caught.

Provers decode token by token in float32 and bfloat16, in one batch, in small batches and with plain
attention, with several ways of sampling; verifiers read every response at once, in both formats.
The law of a pair of formats is fitted to half of the honest responses of a model. The other half is
audited: every audit draws whole responses with replacement, so that what tokens of a response share
stays together. With ``--chat``, a prover in bfloat16 answers messages in one batch, each answer
ends by its end token, and float32 verifies.

    python research/benchmarks/responses.py -o research/results/responses.json --install
    python research/benchmarks/responses.py --model pretrained:smollm2 --chat \
      -o research/results/responses_smollm2.json
"""

import itertools
from dataclasses import replace

import numpy as np
import torch
from _common import note, parser, publish
from assay_research.responses.cheats import HONEST, Scene, honest
from assay_research.responses.field import ALPHA, Field, Ours, receipts, share_accused
from assay_research.responses.provers import Requests, decode, named_seeds, open_model

from assay.files.jsonl import dumps
from assay.files.storage import write_atomic
from assay.models import read_chat
from assay.models.chat import chat_template_digest, render_chat
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.responses import Receipts, Sampling, replay
from assay.poc.responses.response_calibration import BUNDLED_LAWS, fit_response_noise

MODELS = ("reference:qwen3", "reference:llama")
DTYPES = ("float32", "bfloat16")
WAYS = {
    "temperature 1": Sampling(),
    "temperature 0.7, top-p 0.9": Sampling(temperature=0.7, top_p=0.9),
    "temperature 0.8, top-k 20": Sampling(temperature=0.8, top_k=20),
    "greedy": Sampling(temperature=0),
}
CHAT_WAYS = {f"temperature {t:g}": Sampling(temperature=t) for t in (0, 0.7, 1)}
CHAT_WAYS["temperature 1, top-p 0.9"] = Sampling(top_p=0.9)
ASKED = (
    "Explain in three sentences",
    "List five facts about",
    "Tell a child about",
    "Describe the history of",
)
TOPICS = (
    "numbers",
    "music",
    "sleep",
    "trees",
    "coffee",
    "money",
)  # one token each, so that prompts make a batch
MARGIN = 2.0  # of bundled laws over the measured noise, for machines that were not measured
PROMPT = 24
TOKENS = 64
AUDITS = 2000
PROVERS = {"one batch": honest, **HONEST}


def measured(reference, dtype, verifier, count, device):
    """Return the replays of honest responses by prover and way, and those of 4-bit weights by
    way.
    """
    replays = {name: {} for name in PROVERS}
    cheat = {}
    for setting, sampling in WAYS.items():
        field = Field(
            reference=reference,
            dtype=dtype,
            verifier_dtype=verifier,
            device=device,
            honest=count,
            responses=count,
            prompt_tokens=PROMPT,
            steps=TOKENS,
            sampling=sampling,
        )
        served = {name: serve(field.scene, field.asked) for name, serve in PROVERS.items()}
        for name, answers in served.items():
            replays[name][setting] = [response.replayed for response in field.checked(answers)]
        cheat[setting] = [
            response.replayed for response in field.checked(decode(field.scene.int4, field.asked))
        ]
    return replays, cheat


def answered(reference, dtype, verifier, count, device):
    """Return the same of answers to messages, the first ``count`` of 24, each up to its end
    token. A model without a chat template goes on with the text.
    """
    scene = Scene(reference, dtype, device)
    checker = open_model(reference, verifier, device)
    texts = [f"{ask} {topic}." for ask, topic in itertools.product(ASKED, TOPICS)][:count]
    is_chat = checker.tokenizer.chat_template is not None
    chats = [
        render_chat(read_chat([{"role": "user", "content": text}]), checker.tokenizer)
        for text in texts
        if is_chat
    ]
    prompts_BT = torch.tensor(
        checker.tokenizer(chats or texts, add_special_tokens=not is_chat)["input_ids"],
        device=device,
    )
    replays = {}
    cheat = {}
    for setting, sampling in CHAT_WAYS.items():
        requests = Requests(prompts_BT, named_seeds(checker, len(texts), "chat"), sampling, TOKENS)
        for model, by_way in ((scene.model, replays), (scene.int4, cheat)):
            stated = receipts(requests, decode(model, requests), scene.model)
            ended = [up_to_end(response, checker) for response in stated.receipts]
            by_way[setting] = replay(Receipts.build(stated.header, ended, seconds=0.0), checker)
        note(
            f"{setting}: {matching(replays[setting])} honest and {matching(cheat[setting])} of "
            f"int4 match"
        )
    return {"one batch": replays}, cheat


def up_to_end(receipt, model):
    """Return the receipt of an answer up to its first end token, with the chat template that made
    its prompt.
    """
    size = next(
        (at for at, token in enumerate(receipt.output, 1) if token in model.end_tokens),
        len(receipt.output),
    )
    fields = {
        "output": receipt.output[:size],
        "sketches": receipt.sketches[: -(-size // SKETCH_EVERY)],
    }
    fields["finish"] = "stop" if receipt.output[size - 1] in model.end_tokens else "length"
    digest = chat_template_digest(model.tokenizer) or None  # a base model has no template
    return replace(receipt, **fields, chat_template=digest)


def together(by_way):
    """Return the replays of all ways."""
    return [replay for replays in by_way.values() for replay in replays]


def matching(replays):
    """Return the share of tokens that are the verifier's own."""
    return float(np.mean(np.concatenate([replay.margins for replay in replays]) == 0))


def figures(reference, dtype, verifier, found, cheat):
    """Return what one pair of formats shows on one model."""
    provers = [together(by_way) for by_way in found.values()]
    noise = fit_response_noise([replays[::2] for replays in provers], "benchmark")
    everyone = [replay for replays in provers for replay in replays]
    row = {"model": reference, "prover": dtype, "verifier": verifier, "responses": len(everyone)}
    row |= {"matching": matching(everyone), "noise": noise.as_dict(), "audits": AUDITS}
    row["accused"] = share_accused(
        Ours(noise).audited([replay for replays in provers for replay in replays[1::2]], AUDITS)
    )
    row["int4_matching"] = matching(together(cheat))
    for name, tokens_A in Ours(noise).audited(together(cheat), AUDITS // 2, seed=1).items():
        middle, most = np.quantile(tokens_A, (0.5, 0.99), method="higher")
        row[f"int4_{name}"] = {
            "median": float(middle),
            "99%": float(most) if np.isfinite(most) else None,
        }
    row["ways"] = [
        {
            "way": setting,
            "matching": matching(
                [replay for by_way in found.values() for replay in by_way[setting]]
            ),
            "int4_matching": matching(replays),
            "int4_tokens_median": float(
                np.median(Ours(noise).audited(replays, AUDITS // 4, seed=2)["margins"])
            ),
        }
        for setting, replays in cheat.items()
    ]
    return row


def wider(noise):
    """Return the noise a margin larger."""
    tokens, sketches = (
        replace(part, law=part.law.scaled(MARGIN)) for part in (noise.tokens, noise.sketches)
    )
    return replace(noise, tokens=tokens, sketches=sketches)


def main():
    arguments = parser(__doc__)
    arguments.add_argument(
        "--count", type=int, default=32, help="responses of each way of sampling"
    )
    arguments.add_argument(
        "--install", action="store_true", help="write the stated defaults of the package"
    )
    arguments.add_argument("--model", help="this model in place of the bundled ones")
    arguments.add_argument(
        "--chat", action="store_true", help="answers to messages, of at most 24 prompts"
    )
    arguments.add_argument("--device", default="cpu")
    options = arguments.parse_args()
    rows = []
    provers = {}
    pairs = [("bfloat16", "float32")] if options.chat else itertools.product(DTYPES, DTYPES)
    for reference, (dtype, verifier) in itertools.product(
        [options.model] if options.model else MODELS, pairs
    ):
        replays, cheat = (answered if options.chat else measured)(
            reference, dtype, verifier, options.count, options.device
        )
        rows.append(figures(reference, dtype, verifier, replays, cheat))
        note(f"{reference} {dtype} {verifier}: accused {rows[-1]['accused']}")
        provers.setdefault("/".join(sorted((dtype, verifier))), []).extend(
            map(together, replays.values())
        )
    if options.install:  # the default of a pair of formats: both models together, and a margin
        laws = {
            pair: wider(fit_response_noise(of_prover, "default")).as_dict()
            for pair, of_prover in provers.items()
        }
        write_atomic(BUNDLED_LAWS, dumps({"margin": MARGIN, "laws": laws}) + "\n")
    publish("responses", {"alpha": ALPHA, "pairs": rows}, options.output)


if __name__ == "__main__":
    main()
