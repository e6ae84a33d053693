from concurrent.futures import ThreadPoolExecutor

import numba
import pytest

from assay.streams import get_backend, seeds
from assay.streams import numba_backend as compiled
from assay.streams.backends import digest

TEXTS = [f"thread_{i}" for i in range(7)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_bits(monkeypatch, definition, threads):
    monkeypatch.setattr(compiled, "_TILE", 1000)
    backend = get_backend("numba")
    monkeypatch.setattr(backend, "_threads", threads)
    for strength in (32, 256):
        words = seeds(TEXTS, strength)
        assert digest(backend.normals(words, 5003, "float16")) == digest(definition.normals(words, 5003, "float16"))
    assert digest(backend.permutations(seeds(TEXTS), 5003)) == digest(definition.permutations(seeds(TEXTS), 5003))


def test_callers_in_many_threads_do_not_meet(definition):
    backend = get_backend("numba")
    expected = digest(definition.normals(seeds(TEXTS), 40_000))
    with ThreadPoolExecutor(6) as pool:
        made = pool.map(lambda _: digest(backend.normals(seeds(TEXTS), 40_000)), range(24))
        assert set(made) == {expected}


def test_compiles_where_nothing_can_be_kept_on_disk(monkeypatch):
    really = numba.njit

    def nowhere_to_write(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return really(**options)

    monkeypatch.setattr(numba, "njit", nowhere_to_write)
    assert compiled._compiled(lambda x: x + 1)(1) == 2


def add_one(x):
    return x + 1


def test_a_full_disk_costs_only_the_cache(monkeypatch, tmp_path):
    from numba.core import caching

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", lambda self: None)
    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert compiled._compiled(add_one)(1) == 2
