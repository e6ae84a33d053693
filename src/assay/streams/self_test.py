"""The self-test of a backend: digests of every kind of stream, and what they must be."""

from collections.abc import Mapping

from assay.streams.arrays import DTYPES, digest
from assay.streams.backends import Backend
from assay.streams.definition import seeds

SELFTEST_EXPECTED: Mapping[str, str] = {
    "hash": "23d018db47fab4326aa227a8c8a2a60734e8498506263145814a2a8da0695778",
    "uniform": "3f05a304d08f386ac5f37a8d2d3b2a26d4e445258af6313adf4886b5ef8530e8",
    "signs": "831ed7e5b7a2474d677b999b72a02eb05a523c92e1661d92a19e5db073470a4c",
    "permutation": "dd69ead6e84da1ffa6d70af372d4d913869e50c3a2568bd6c4c6b20da7ad3108",
    "pick 12": "f30de919f7b75f693d23aa734440224d260b94fb5631fac27c5c54dfdcccb86c",
    "gumbel": "261f9128b224efefbc9211d091d99ab64d0633f022131ea6f8219c8adaf0bd76",
    "normal float32": "188011b514762ed49cc6159ff404f1bfb20c4979d161c8ee4c90a4ad55c6ee8f",
    "normal float32 strength 256": (
        "0b04710f9c4a0553053268fe6a9635d4538458340e30400aaa3902aef7472757"
    ),
    "normal float16": "ff7a53c089f10b5545f4c17618f5a944943febb7c755b5b8ea5fdf714c93571a",
    "normal float16 strength 256": (
        "85799d51e221c62088cc1e1ecb90f084e4c036eb3e6928ca1f38d80b54905d01"
    ),
    "normal bfloat16": "dbaaa7594a4bc1f9a21b1e6bd5c4299fb3bbebedf7c0b550d5e28532cc1de3d7",
    "normal bfloat16 strength 256": (
        "9ae6f63322b581edc4a157e74f9fbdd6536290bea082094db162e3dfe2a42096"
    ),
}
"""What :func:`selftest` returns for a backend that computes the streams as they are defined.

The numpy definition made these digests.
"""

_TEXTS = [f"assay_selftest_{i}" for i in range(3)]
_SHORT = 4097
_LONG = 65537


def selftest(backend: Backend) -> dict[str, str]:
    """Return the SHA-256 of three streams of every kind and dtype, by name.

    A correct backend returns :data:`SELFTEST_EXPECTED`.

    Raises:
        OutOfMemory: The device has no room for a megabyte.
    """
    plain = seeds(_TEXTS)
    strong = seeds(_TEXTS, strength=256)
    streams = {
        "hash": backend.hashes(plain, _SHORT),
        "uniform": backend.uniforms(plain, _SHORT),
        "signs": backend.signs(plain, _SHORT),
        "permutation": backend.permutations(plain, _SHORT),
        "pick 12": backend.picks(plain, _SHORT, 12),
        "gumbel": backend.gumbels(plain, _LONG),
    }
    for dtype in DTYPES:
        streams[f"normal {dtype}"] = backend.normals(plain, _LONG, dtype)
        streams[f"normal {dtype} strength 256"] = backend.normals(strong, _SHORT, dtype)
    return {name: digest(stream) for name, stream in streams.items()}
