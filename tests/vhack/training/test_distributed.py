"""Two CPU processes that talk over gloo take the same steps as one process with all rows."""

import multiprocessing

import pytest
import torch

from tests.vhack.training import distributed


@pytest.fixture(scope="module")
def ranks(small_checkpoint, tmp_path_factory):
    """What each of two processes found, all cases in one go: starting one takes longer than what it does.

    The first of the two is this one.
    """
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    other = multiprocessing.get_context("spawn").Process(target=distributed.run, args=(1, small_checkpoint, folder))
    other.start()
    try:
        distributed.run(0, small_checkpoint, folder)
        other.join(60)
    finally:
        other.kill()
        torch.set_num_threads(threads)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


CASES = {
    "ddp gradient": ("gradient", False),
    "ddp update": ("update", False),
    "ddp rollouts": ("gradient", True),
    "fsdp replicated": ("update", False),
    "fsdp sharded": ("update", False),
    "fsdp plain optimiser": ("update", False, True),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(ranks, small_checkpoint, case):
    wanted = distributed.single(small_checkpoint, *CASES[case])
    for found in (ranks[0][case], ranks[1][case]):
        for name, value in wanted["delta"].items():
            torch.testing.assert_close(found["delta"][name], value, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found["weight"], wanted["weight"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["reference"], wanted["reference"], rtol=1e-4, atol=1e-4)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["measures"] == pytest.approx(wanted["measures"], rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_both_processes_hold_the_same_model(ranks, case):
    first, second = ranks[0][case], ranks[1][case]
    assert all(torch.equal(first["delta"][name], second["delta"][name]) for name in first["delta"])
    assert torch.equal(first["weight"], second["weight"])
