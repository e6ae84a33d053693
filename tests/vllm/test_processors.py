"""The logits processors of both interfaces, against the definition in numpy, on the CPU and without
an engine.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assay.poc.responses import Sampling
from assay.poc.responses.sampling import counts_before, mark_tokens, step_seeds
from assay.poc.vllm.response_worker import ARGUMENT, SeedArgument
from tests.poc.responses.vectors import scores

VOCABULARY = 97
SAMPLINGS = (
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=0.0, repetition_penalty=1.3, logit_bias={0: 2.0, 5: -1.0}),
    Sampling(frequency_penalty=0.7, presence_penalty=-0.4, repetition_penalty=0.8, top_k=20),
    Sampling(min_p=0.1, logit_bias={3: 4.0}),
)
PROMPTS = ([1, 2, 3], [5, 5, 8, 9], [7] * 6, [90, 3])
OUTPUTS = ([4, 4], [], [7, 11, 11, 2], [1])


def words(number: int) -> tuple[int, ...]:
    return tuple(range(number * 8, number * 8 + 8))


def params(number: int | None):
    if number is None:
        return SimpleNamespace(extra_args=None)
    carried = SeedArgument(len(PROMPTS[number]), words(0), words(number), SAMPLINGS[number])
    return SimpleNamespace(extra_args={ARGUMENT: carried.as_argument()})


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    made = 4 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    made[:, 10:14] = -torch.inf  # what a grammar forbids
    return made


def wanted(row: torch.Tensor, number: int, output: list[int]) -> list[float]:
    """Return the scores of the definition for a request after some output."""
    found = scores(
        row.numpy(),
        SAMPLINGS[number],
        step_seeds(np.array(words(number), np.uint32), [len(output)]),
        prompt_V=mark_tokens(PROMPTS[number], VOCABULARY),
        counts_NV=counts_before(output, VOCABULARY, len(output), len(output) + 1)
        if output
        else np.zeros((1, VOCABULARY), np.int32),
    )
    return found[0].tolist()


def update(added=(), removed=(), moved=()):
    return SimpleNamespace(
        batch_size=0, added=list(added), removed=list(removed), moved=list(moved)
    )


def test_v1_gives_the_scores_of_the_definition_as_requests_come_move_and_go():
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

    from assay.poc.vllm.processors import ProcessorV1

    assert issubclass(ProcessorV1, LogitsProcessor)
    processor = ProcessorV1(None, torch.device("cpu"), False)
    outputs = [list(output) for output in OUTPUTS]
    assert processor.apply(given := logits(2)) is given
    processor.update_state(update([(i, params(i), PROMPTS[i], outputs[i]) for i in range(4)]))
    for turn in range(3):
        given = logits(4, turn)
        made = processor.apply(given.clone())
        for row in range(4):
            assert made[row].tolist() == wanted(given[row], row, outputs[row])
            outputs[row].append(int(made[row].argmax()))
        processor.update_state(None)
    # A request that is not seeded comes, one goes, and two change places.
    swap = (0, 2, MoveDirectionality.SWAP)
    processor.update_state(
        update([(4, params(None), [1], [])], [3], [(4, 3, MoveDirectionality.UNIDIRECTIONAL), swap])
    )
    given = logits(4, 9)
    made = processor.apply(given.clone())
    for row, number in ((0, 2), (1, 1), (2, 0)):
        assert made[row].tolist() == wanted(given[row], number, outputs[number])
    assert made[3].tolist() == given[3].tolist()
    # It goes again: the rows that stay are all there are.
    processor.update_state(update(removed=[3]))
    made = processor.apply((given := logits(3, 10)).clone())
    assert made[1].tolist() == wanted(given[1], 1, outputs[1])


def test_tokens_that_are_not_there_yet_and_ids_without_a_logit_do_not_count():
    from assay.poc.vllm.processors import count_tokens

    counted = count_tokens([[3, 3, 4], [-1], [0, 5], []], 5, torch.device("cpu"))
    assert counted.tolist() == [[0, 0, 0, 2, 1], [0] * 5, [1, 0, 0, 0, 0], [0] * 5]


class States:
    """As much of ``LogitsProcRequestState`` as is read."""

    device = torch.device("cpu")
    max_num_reqs = 8
    vocab_size = VOCABULARY

    def __init__(self) -> None:
        ids = torch.zeros(8, 32, dtype=torch.int32)
        self.all_token_ids = SimpleNamespace(gpu=ids)
        self.prompt_len = SimpleNamespace(gpu=torch.zeros(8).int())
        self.total_len = SimpleNamespace(gpu=torch.zeros(8).int())

    def put(self, slot: int, prompt: list[int], output: list[int]) -> None:
        whole = torch.tensor(prompt + output).int()
        self.all_token_ids.gpu[slot, : len(whole)] = whole
        self.prompt_len.gpu[slot], self.total_len.gpu[slot] = len(prompt), len(whole)


def context(states: States, slots: list[int], drafts: dict[int, list[int]]):
    """Lay out the rows of a step as the V2 runner does: a request, then its drafts, one row
    each.
    """
    rows = [(slot, local) for slot in slots for local in range(1 + len(drafts.get(slot, [])))]
    last = {slot: int(states.total_len.gpu[slot]) - 1 for slot in slots}
    fed = [
        drafts[slot][local - 1] if local else int(states.all_token_ids.gpu[slot, last[slot]])
        for slot, local in rows
    ]
    return SimpleNamespace(
        expanded_idx_mapping=torch.tensor([slot for slot, _ in rows]).int(),
        idx_mapping=torch.tensor(slots).int(),
        idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.tensor([local for _, local in rows]).int(),
        input_ids=torch.tensor(fed).int(),
        pos=torch.tensor([last[slot] + local for slot, local in rows]),
        # An upper bound where there are drafts, and exact without them, as vLLM says of it.
        seq_lens_upper_bound_np=np.array([last[slot] + (3 if drafts else 1) for slot in slots]),
    )


def processor_v2(drafts: int):
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    from assay.poc.vllm.processors import ProcessorV2

    assert issubclass(ProcessorV2, LogitsProcessor)
    states = States()
    speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
    return states, ProcessorV2(SimpleNamespace(speculative_config=speculative), states)


@pytest.mark.parametrize("at_once", [2**24, 2 * VOCABULARY])
@pytest.mark.parametrize("drafts", [{}, {6: [7, 30], 1: [2]}], ids=["plain", "drafts"])
def test_v2_gives_the_scores_of_the_definition_for_every_row(
    drafts, at_once, monkeypatch: pytest.MonkeyPatch
):
    states, processor = processor_v2(2 if drafts else 0)
    monkeypatch.setattr("assay.poc.vllm.processors.MOST_VALUES", at_once)
    slots = {0: 3, 1: 1, 2: 6, 3: 0, None: 5}  # request → slot; one is not seeded
    for number, slot in slots.items():
        assert processor.add_request(slot, params(number)) == (number is not None)
        states.put(
            slot,
            [1, 2] if number is None else PROMPTS[number],
            [9] if number is None else OUTPUTS[number],
        )
    processor.apply_staged_writes()
    for order in ([3, 5, 6, 1, 0], [1, 6, 3]):
        ctx = context(states, order, drafts)
        given = logits(len(ctx.pos), len(order))
        made = processor.apply(given.clone(), ctx)
        for row, (slot, local) in enumerate(
            zip(ctx.expanded_idx_mapping.tolist(), ctx.expanded_local_pos, strict=True)
        ):
            number = next(number for number, at in slots.items() if at == slot)
            if number is None:
                assert made[row].tolist() == given[row].tolist()
            else:
                output = OUTPUTS[number] + drafts.get(slot, [])[: int(local)]
                assert made[row].tolist() == wanted(given[row], number, output)


def test_v2_gives_every_step_its_noise_while_a_batch_stays_and_when_it_changes():
    """Seeds are made for several steps ahead: requests come, wait and go, and a prompt comes in
    pieces.
    """
    states, processor = processor_v2(0)
    slots = {2: 0, 4: 3}
    prompts = {2: PROMPTS[0], 4: PROMPTS[3]}
    outputs: dict[int, list[int]] = {2: [], 4: []}
    for slot, number in slots.items():
        processor.add_request(slot, params(number))
    for turn in range(45):
        order = [4] if turn in (3, 4) or turn > 40 else [4, 2] if turn > 25 else [2, 4]
        for slot in slots:
            states.put(slot, prompts[slot], [])
        ctx = context(states, order, {})
        given = logits(len(order), turn)
        ctx.seq_lens_upper_bound_np = np.array(
            [len(prompts[slot]) + len(outputs[slot]) for slot in order]
        )
        if turn == 0:  # the first piece of a prompt: its row gives nothing
            ctx.seq_lens_upper_bound_np[0] -= 1
        made = processor.apply(given.clone(), ctx)
        for row, slot in enumerate(order):
            if turn or row:
                assert made[row].tolist() == wanted(given[row], slots[slot], outputs[slot])
                outputs[slot].append(int(made[row].argmax()))
    assert len(outputs[4]) == 45


def test_v2_leaves_a_step_without_seeded_requests_alone_and_a_slot_can_be_used_again():
    states, processor = processor_v2(0)
    states.put(2, PROMPTS[0], OUTPUTS[0])
    processor.add_request(2, params(0))
    processor.apply_staged_writes()
    ctx = context(states, [2], {})
    given = logits(1)
    assert processor.apply(given.clone(), ctx)[0].tolist() == wanted(given[0], 0, OUTPUTS[0])
    assert not processor.add_request(2, params(None))
    processor.apply_staged_writes()
    assert processor.apply(given, ctx) is given
