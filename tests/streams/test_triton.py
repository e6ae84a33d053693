"""What only the triton backend has: the machine code, the root without a branch, reflections, and
no waiting.
"""

import re

import numpy as np
import pytest
import torch

from assay.errors import BackendUnavailable
from assay.streams import definition as _definition
from assay.streams import get_backend, seeds
from assay.streams.arrays import digest

pytestmark = pytest.mark.gpu

ROWS = 6
REFLECTIONS = 8
TEXTS = [f"stream_{i}" for i in range(ROWS)]
ASM = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)
FUSED = re.compile(r"\b(?:fma|mad)\.[\w.]*f32")
NOT_ROUNDED = re.compile(r"\b(?:add|sub|mul|div)\.(?!rn)[\w.]*f32")


@pytest.fixture(scope="module")
def triton_backend():
    try:
        return get_backend("triton", "cuda")
    except BackendUnavailable as error:
        pytest.skip(f"triton on cuda: {error.seen}")


@pytest.fixture
def compiled(triton_backend, monkeypatch):
    """What the backend launched, kernel by kernel."""
    kernels = []
    launch = type(triton_backend).launch

    def record(*arguments, **options):
        kernels.append(launch(*arguments, **options))

    monkeypatch.setattr(type(triton_backend), "launch", record)
    return kernels


def reflection_seeds(rows=ROWS):
    return seeds(
        [f"reflection_{row}_{r}" for row in range(rows) for r in range(REFLECTIONS)]
    ).reshape(rows, -1)


def states(rows, d):
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(d)) * 3


def check_no_fused_operation(ptx):
    """Every float operation rounds once, by itself; only the root, which is written out, has a
    fused residual.
    """
    roots = [block for block in ASM.findall(ptx) if "rsqrt.approx" in block]
    assert roots
    for root in roots:
        assert (len(FUSED.findall(root)), root.count("rsqrt.approx")) == (2, 1)
    rest = ASM.sub(lambda found: "" if found.group() in roots else found.group(), ptx)
    assert FUSED.findall(rest) == []
    assert NOT_ROUNDED.findall(rest) == []
    assert len(re.findall(r"\bmul\.rn\.f32", rest)) >= 20 * len(roots)


@pytest.mark.parametrize("n", [4096, 4099], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_fused_multiply_add_in_the_normals(triton_backend, compiled, dtype, n):
    triton_backend.normals(seeds(TEXTS), n, dtype)
    (kernel,) = compiled
    check_no_fused_operation(kernel.asm["ptx"])
    # In the machine code, after the last compiler: two in every root, none elsewhere.
    machine = kernel.asm["sass"]
    assert machine.count("MUFU.RSQ") == 8
    assert machine.count("FFMA") == 2 * machine.count("MUFU.RSQ")


@pytest.mark.parametrize("d", [12, 256, 1024, 4096, 16_384])
def test_no_fused_multiply_add_in_the_reflections(triton_backend, compiled, d):
    triton_backend.reflected(states(ROWS, d).cuda(), reflection_seeds())
    (kernel,) = compiled
    check_no_fused_operation(kernel.asm["ptx"])


def noise_arguments(columns, rows=None):
    """Scores, and on the device the seeds of some rows and their numbers."""
    scores = states(ROWS, columns).cuda()
    count = ROWS if rows is None else len(rows)
    on_device = torch.from_numpy(seeds(TEXTS)[:count, 0]).cuda()
    return scores, (on_device, None if rows is None else torch.tensor(rows).cuda())


def test_a_row_that_does_not_exist_gets_nothing(triton_backend):
    scores, numbers = noise_arguments(5000, [ROWS, -1])
    whole = torch.cat([scores, scores])  # what a write to the row after the last would change
    triton_backend.add_gumbels(whole[:ROWS], *numbers)
    assert whole.equal(torch.cat([scores, scores]))


def test_the_root_of_every_value_there_is(triton_backend):
    """All float32 from 2**-30 to 16, and 0, against the float64 root, which rounds to the right
    float32.
    """
    from tests.streams.interpreted import root_kernel

    first, last = (int(np.float32(value).view(np.int32)) for value in (2.0**-30, 16.0))
    step = 1 << 25
    block = 1024
    out = torch.empty(step, device="cuda")
    compared = 0
    for start in [0, *range(first, last, step)]:
        root_kernel[(step // block,)](start, out, BLOCK=block, enable_fp_fusion=False)
        values = torch.arange(start, start + step, device="cuda", dtype=torch.int32).view(
            torch.float32
        )
        wanted = values.double().sqrt().float()
        right = out.view(torch.int32) == wanted.view(torch.int32)
        # The first piece is there for zero alone: what follows it is subnormal and does not occur.
        assert bool(right[0] if start == 0 else right.all())
        compared += 1 if start == 0 else step
    assert compared > last - first


@pytest.mark.parametrize("d", [1, 2, 3, 12, 255, 256, 1024, 5000, 16_384])
def test_reflections(triton_backend, definition, d):
    x_BD = states(ROWS, d)
    seeds_BR = reflection_seeds()
    expected = x_BD.double().numpy()
    for r in range(REFLECTIONS):
        v = np.asarray(definition.normals(seeds_BR[:, r], d)).astype(np.float64)
        expected -= 2 * ((expected * v).sum(1) / (v * v).sum(1))[:, None] * v
    made = triton_backend.reflected(x_BD.cuda(), seeds_BR)
    assert made.dtype == torch.float32
    error = np.linalg.norm(made.cpu().double().numpy() - expected, axis=1)
    assert (error <= 1e-6 * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.parametrize("d", [12, 256, 5000])
def test_a_reflected_row_does_not_depend_on_its_batch(triton_backend, d):
    x_BD = states(300, d).cuda()
    seeds_BR = reflection_seeds(300)
    whole = triton_backend.reflected(x_BD, seeds_BR)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(triton_backend.reflected(x_BD[order], seeds_BR[order.numpy()]), whole[order])
    assert torch.equal(triton_backend.reflected(x_BD[7:8], seeds_BR[7:8]), whole[7:8])


def test_not_finite_stays_not_finite(triton_backend):
    x_BD = states(ROWS, 256).cuda()
    x_BD[2, 100] = torch.nan
    made = triton_backend.reflected(x_BD, reflection_seeds())
    assert torch.isfinite(made).all(dim=1).tolist() == [row != 2 for row in range(ROWS)]


def test_what_has_no_fused_kernel(triton_backend):
    assert (
        triton_backend.reflected(torch.zeros(2, 16_385, device="cuda"), reflection_seeds(2)) is None
    )
    assert (
        triton_backend.reflected(
            torch.zeros(2, 64, device="cuda", dtype=torch.float16), reflection_seeds(2)
        )
        is None
    )
    assert triton_backend.reflected(torch.zeros(2, 64), reflection_seeds(2)) is None


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_nothing_waits_for_the_device(triton_backend, name):
    backend = get_backend(name, "cuda")
    calls = [
        lambda: backend.normals(seeds(TEXTS, 256), 4099, "float16"),
        lambda: backend.picks(seeds(TEXTS), 256, 12),
    ]
    kinds = ("signs", "permutations", "gumbels")
    calls += [lambda kind=kind: getattr(backend, kind)(seeds(TEXTS), 256) for kind in kinds]
    for rows in (None, [4, 0]):
        scores, numbers = noise_arguments(5000, rows)
        calls.append(lambda scores=scores, numbers=numbers: backend.add_gumbels(scores, *numbers))
    words = torch.from_numpy(seeds(TEXTS, 256)).cuda()
    steps = torch.arange(ROWS, device="cuda")
    calls.append(lambda: backend.row_seeds(words, steps))
    if name == "triton":
        x_BD = states(ROWS, 256).cuda()
        calls.append(lambda: backend.reflected(x_BD, reflection_seeds()))
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [call() for call in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(made) == len(calls)


def test_on_a_stream_of_its_own(triton_backend, definition):
    """Seeds go to the stream that is current, and stay there until they were read."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        made = [triton_backend.normals(seeds([f"{i}"]), 512, "bfloat16") for i in range(50)]
    stream.synchronize()
    for i, normals in enumerate(made):
        assert digest(normals) == digest(definition.normals(seeds([f"{i}"]), 512, "bfloat16"))


def test_more_rows_than_a_grid_has(triton_backend, definition):
    many = np.arange(70_000, dtype=np.uint32)
    assert digest(triton_backend.normals(many, 6, "float16")) == digest(
        definition.normals(many, 6, "float16")
    )
    assert digest(triton_backend.signs(many, 3)) == digest(definition.signs(many, 3))


def test_a_batch_in_many_grids(triton_backend, definition, monkeypatch):
    """Rows and sub-seeds both beyond the limit of a grid, which is made small for it."""
    monkeypatch.setattr("assay.streams.triton_backend.LARGEST_GRID", 3)
    crafted = np.arange(50 * 8, dtype=np.uint32).reshape(50, 8) * 977
    for n in (100, 4096, 5000):
        assert digest(triton_backend.normals(crafted, n)) == digest(definition.normals(crafted, n))


@pytest.mark.parametrize("extra", [0, 32], ids=["2**31", "more"])
def test_a_stream_of_billions(triton_backend, extra):
    """Offsets, and lengths themselves, beyond int32: the ends of both halves."""
    n = 2**31 + extra
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("less than 6 GB of free GPU memory")
    seed = seeds(["billions"])[:, 0]
    pairs = n // 2
    made = triton_backend.normals(seed, n, "float16")[0]
    for start, stop in ((0, 2048), (pairs - 2048, pairs)):
        u1, u2 = (_definition.uniforms(seed, at + start, at + stop) for at in (0, pairs))
        for half, expected in zip((0, pairs), _definition.box_muller(u1, u2), strict=True):
            assert digest(made[half + start : half + stop]) == digest(
                expected[0].astype(np.float16)
            )
