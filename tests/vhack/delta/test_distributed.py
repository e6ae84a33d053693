"""Two processes take the same steps as one process with all rows: on a CPU over gloo, on two GPUs
over NCCL.
"""

import pytest
import torch
from assay_research.arms import Box, Gate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from assay.errors import ModelError, UsageError
from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer
from tests.vhack.delta.conftest import loss_of, own, random_basis
from tests.vhack.two_processes import BACKENDS, device_of, together

STEPS = 3
pytestmark = pytest.mark.slow  # two processes are started
GATE = Gate("one_sided", 1.2)
IDS = torch.randint(0, 512, (4, 20), generator=torch.Generator().manual_seed(3))


def prepare(path, device):
    torch.set_num_threads(1)
    module = load_model(path, dtype="float32", device=str(device)).module
    svd = weight_svd(module)
    return module, svd, random_basis(svd)


def optimise(adapter, basis, level):
    inner = torch.optim.AdamW(adapter.delta, lr=0.02, weight_decay=0.1)
    return ProjectedOptimizer(inner, adapter, basis, arm=own(gate=GATE, level=level, box=Box(0.02)))


def result(adapter, optimiser, module):
    ids = IDS.to(adapter.groups[0].base.device)
    with torch.no_grad():
        module(input_ids=ids, use_cache=False)  # merges what a plain optimiser has left unmerged
    handed = dict(adapter.weights())
    assert len(handed) == sum("delta_s" not in name for name, _ in module.named_parameters())
    weight = module.model.layers[1].mlp.up_proj.weight.detach().clone()
    with torch.no_grad(), adapter.disabled():
        reference = module(input_ids=ids, use_cache=False).logits
    return {
        "delta": {name: value.cpu() for name, value in adapter.values().items()},
        "measures": optimiser.measures.as_dict(),
        "weight": weight.cpu(),
        "handed": handed["model.layers.1.mlp.up_proj.weight"].cpu(),
        "reference": reference.cpu(),
        "loss": loss_of(module, ids).item(),
    }


def train(call, optimiser, ids):
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss_of(call, ids).backward()
        optimiser.step()


def single(path, backend, level):
    """Take the steps in one process, with all rows."""
    module, svd, basis = prepare(path, device_of(backend))
    adapter = DeltaS(module, svd)
    optimiser = optimise(adapter, basis, level)
    train(module, optimiser, IDS.to(device_of(backend)))
    return result(adapter, optimiser, module)


def run(rank, device, path):
    """Everything that needs two processes, one after the other; return what this one found."""
    share = IDS[2 * rank : 2 * rank + 2].to(device)
    found = {f"ddp {level}": _ddp(path, share, level) for level in ("gradient", "update")}
    found["refused"] = _refused(path, share.device)
    return found


def _refused(path, device):
    """Whether δS of a divided model is refused."""
    module, svd, basis = prepare(path, device)
    adapter = DeltaS(load_model(path, dtype="float32", device=str(device)).module, svd)
    fully_shard(adapter.model, mesh=init_device_mesh(device.type, (2,)))
    with pytest.raises(UsageError, match="after fully_shard"):
        optimise(adapter, basis, "update")
    sharded = fully_shard(module, mesh=init_device_mesh(device.type, (2,)))
    return [_is_refused(DeltaS, sharded)]


def _is_refused(work, module):
    try:
        work(module)
    except ModelError as error:
        return "divided over processes" in error.seen
    return False


def _ddp(path, share, level):
    module, svd, basis = prepare(path, share.device)
    adapter = DeltaS(module, svd)
    wrapped = DistributedDataParallel(module)
    optimiser = optimise(adapter, basis, level)
    train(wrapped, optimiser, share)
    return result(adapter, optimiser, module)


# On a GPU sums come out in another order, and Adam's first steps are as large for a tiny gradient
# as for any other.
SLACK = {"gloo": {"rtol": 1e-3, "atol": 2e-5}, "nccl": {"rtol": 1e-2, "atol": 1e-3}}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(small_checkpoint, tmp_path_factory, backend):
    """What each of two processes found, all cases in one go: starting one takes longer than what it
    does.
    """
    folder = tmp_path_factory.mktemp("ranks")
    return together(run, folder, backend, small_checkpoint)


@pytest.mark.parametrize("level", ["gradient", "update"])
def test_two_processes_take_the_steps_of_one_and_hold_the_same_model(
    ranks, small_checkpoint, level, backend
):
    case = f"ddp {level}"
    wanted = single(small_checkpoint, backend, level)
    for found in (ranks[0][case], ranks[1][case]):
        for name, value in wanted["delta"].items():
            torch.testing.assert_close(found["delta"][name], value, **SLACK[backend])
        torch.testing.assert_close(
            found["weight"], wanted["weight"], rtol=1e-4, atol=SLACK[backend]["atol"] / 2
        )
        torch.testing.assert_close(found["reference"], wanted["reference"], rtol=1e-4, atol=1e-4)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["measures"] == pytest.approx(wanted["measures"], rel=2e-2, abs=1e-4)
    first = ranks[0][case]
    second = ranks[1][case]
    assert all(torch.equal(first["delta"][name], second["delta"][name]) for name in first["delta"])
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(first["handed"], first["weight"])


def test_what_needs_whole_weights_refuses_a_model_that_is_divided(ranks):
    assert all(all(rank["refused"]) for rank in ranks)
