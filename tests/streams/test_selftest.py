from assay.streams import selftest
from assay.streams.backends import SELFTEST_EXPECTED


def test_every_backend_passes(backend):
    assert selftest(backend) == SELFTEST_EXPECTED


def test_a_wrong_backend_is_found(definition):
    class OneBitOff(type(definition)):
        def _normals(self, seeds_BS, n, dtype):
            normals = super()._normals(seeds_BS, n, dtype)
            normals.view("u2")[-1, -1] ^= 1
            return normals

    found = selftest(OneBitOff("cpu"))
    assert {name for name in found if found[name] != SELFTEST_EXPECTED[name]} == {
        name for name in SELFTEST_EXPECTED if name.startswith("normal")
    }
