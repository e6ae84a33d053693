"""The serving part of recorded responses, without vLLM: seeds, receipts, and what has neither."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from assay.errors import ModelError, StorageError
from assay.poc.responses import Prompt, ResponseSeed, Sampling
from assay.poc.responses.adapters import Adapter, digest_adapter
from assay.poc.vllm.carried import ARGUMENT, Carried, as_words, carried_by
from assay.poc.vllm.recorder import ACCEPTED, Accepted
from tests.vllm.recording import DIGEST, LLM, Sink, ask, params, recorded


def test_every_choice_has_its_seed_and_its_receipt():
    llm, sink = LLM(), Sink()
    recorder = recorded(llm, sink)
    asyncio.run(ask(llm, Accepted("r", "block", None, "client"), ((5, 6), (7,)), n=2, seed=11))
    assert [(one.index, one.output, one.finish, one.user_seed) for one in sink.receipts] == [
        (0, (0, 0, 0), "stop", "11"),
        (1, (1, 1, 1), "stop", "11"),
        (2, (0, 0, 0), "stop", "11"),
        (3, (1, 1, 1), "stop", "11"),
    ]
    assert sink.receipts[2].prompt == Prompt.of([7])
    assert sink.receipts[0].sampling == Sampling(temperature=0.7, top_p=0.9)
    assert {one.chosen_by for one in sink.receipts} == {"client"}
    assert len(llm.calls) == 2  # the choices that end together are collected together
    seed = ResponseSeed(user_seed="11", request_id="r", public_key="node", digest=DIGEST, block_hash="block", index=3)
    carried = carried_by(llm.sent[3].sampling_params)
    assert carried == Carried(1, as_words(seed.words("sketch")), as_words(seed.words()), sink.receipts[3].sampling)
    assert (llm.sent[3].sampling_params.temperature, llm.sent[3].sampling_params.seed) == (0.0, None)
    assert recorder.counts == {"stored": 4, "unrecorded": 0, "failed": 0}


def test_the_receipt_is_stored_before_the_last_output_and_without_it_there_is_no_last_output():
    llm, sink = LLM(), Sink()
    recorded(llm, sink)
    sink.error = StorageError("disk full", wanted="room", do="make room")
    accepted, seen = Accepted("r", "block"), []

    async def scenario():
        ACCEPTED.set(accepted)
        async for output in llm.generate((5,), params(), "cmpl-0"):
            seen.append(output)  # noqa: PERF401

    with pytest.raises(StorageError):
        asyncio.run(scenario())
    assert len(seen) == 2
    assert accepted.refused is sink.error


def test_a_response_whose_sketches_are_missing_does_not_end():
    llm, sink = LLM(), Sink()
    recorded(llm, sink)
    llm.sketches = False
    with pytest.raises(ModelError, match="0 sketches of 3 tokens"):
        asyncio.run(ask(llm, Accepted("r", "block")))
    assert sink.receipts == []


def test_a_client_that_leaves_leaves_no_receipt_and_the_workers_forget():
    async def scenario(llm):
        await ask(llm, Accepted("r", "block"), stop_after=1)
        await ask(llm, Accepted("s", "block"))

    llm, sink = LLM(), Sink()
    recorded(llm, sink)
    asyncio.run(scenario(llm))
    assert [one.request_id for one in sink.receipts] == ["s"]
    assert llm.calls == [("assay_sketches", {"0_cmpl-0-ab": [0, 1]}, ["0_cmpl-0-ab"])]


def test_sketches_are_taken_while_a_response_goes_on_and_one_that_ends_waits_for_those_of_its_last_steps():
    llm, sink = LLM(turns=70, pause=0.006), Sink()
    recorded(llm, sink)
    asyncio.run(ask(llm, Accepted("r", "block"), stop_after=99))
    asked = [numbers for _, wanted, _ in llm.calls for numbers in wanted.values()]
    assert asked == [[0, 1], [1, 2], [2, 3]]
    assert sink.receipts[0].sketches[:, 0].tolist() == [0, 1, 2]

    late, sink = LLM(turns=33), Sink()
    recorded(late, sink)
    asyncio.run(ask(late, Accepted("r", "block"), stop_after=99))
    assert sink.receipts[0].sketches[:, 0].tolist() == [0, 1]


def test_a_response_that_ends_during_a_call_waits_for_the_next_one():
    class Slow(LLM):
        async def collective_rpc(self, method, args):
            reply = await super().collective_rpc(method, args)
            await asyncio.sleep(0.05)
            return reply

    llm, sink = Slow(turns=33, pause=0.004), Sink()
    recorded(llm, sink)
    asyncio.run(ask(llm, Accepted("r", "block"), stop_after=99))
    assert [wanted for _, wanted, _ in llm.calls] == [{"0_cmpl-0-ab": [0, 1]}, {"0_cmpl-0-ab": [1, 2]}]
    assert len(sink.receipts[0].sketches) == 2


def test_workers_that_do_not_answer_fail_the_response_by_name():
    class Ended(LLM):
        async def collective_rpc(self, method, args):
            raise RuntimeError("engine died")

    llm, sink = Ended(), Sink()
    recorded(llm, sink)
    with pytest.raises(ModelError, match="engine died"):
        asyncio.run(ask(llm, Accepted("r", "block")))
    assert sink.receipts == []


def lora_request(path: Path) -> SimpleNamespace:
    return SimpleNamespace(lora_name="tuned", lora_path=str(path), lora_int_id=1, load_inplace=False)


def test_the_receipt_of_an_adapter_names_it_by_its_files(tmp_path: Path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text(name)
    llm, sink = LLM(), Sink()
    recorded(llm, sink)

    async def scenario():
        ACCEPTED.set(Accepted("r", "block"))
        return [one async for one in llm.generate((5,), params(), "cmpl-0", lora_request=lora_request(tmp_path))]

    asyncio.run(scenario())
    assert [one.adapter for one in sink.receipts] == [Adapter("tuned", digest_adapter(tmp_path))]
    assert llm.sent[0].sampling_params.temperature == 0


@pytest.mark.parametrize(
    "options", [{"lora_request": lora_request(Path("hub/id"))}, {"prompt_embeds": 1}, {"mm_features": [1]}]
)
def test_requests_that_a_receipt_cannot_name_pass_unseeded(options):
    llm, sink = LLM(), Sink()
    recorder = recorded(llm, sink)

    async def scenario():
        ACCEPTED.set(Accepted("r", "block"))
        return [output async for output in llm.generate((5,), params(seed=3), "cmpl-0", **options)]

    assert len(asyncio.run(scenario())) == 3
    sent = llm.sent[0].sampling_params
    assert (sent.temperature, sent.seed, ARGUMENT in sent.extra_args) == (0.7, 3, False)
    assert (sink.receipts, recorder.counts["unrecorded"]) == ([], 1)


def test_a_client_cannot_send_what_only_the_plugin_may():
    llm, sink = LLM(), Sink()
    recorded(llm, sink)
    asyncio.run(ask(llm, None, extra_args={ARGUMENT: {"prompt": 1}, "own": 2}))
    assert llm.sent[0].sampling_params.extra_args == {"own": 2}
    assert llm.sent[0].sampling_params.temperature == 0.7


def test_without_a_processor_the_engine_samples_and_the_receipt_says_so():
    llm, sink = LLM(), Sink()
    recorded(llm, sink, seeded=False)
    asyncio.run(ask(llm, Accepted("r", "block"), seed=4))
    assert sink.receipts[0].sampling is None
    assert (llm.sent[0].sampling_params.temperature, llm.sent[0].sampling_params.seed) == (0.7, 4)


def test_masks_are_named():
    llm, sink = LLM(), Sink()
    recorded(llm, sink)
    for given in ({}, {"bad_words": ["x"]}, {"min_tokens": 2}, {"structured_outputs": object()}):
        asyncio.run(ask(llm, Accepted("r", "block"), **given))
    assert [one.mask for one in sink.receipts] == [False, True, True, True]
