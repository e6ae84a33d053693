"""Safetensors files whose header would take all memory, by every way in."""

import sys

import pytest

from assay.errors import AssayError
from assay.models.checkpoint import list_tensors
from assay.models.frame import Frame
from assay.poc.responses.adapters import load_adapter
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.delta_file import read_delta_lengths


def _adapter(path):
    (path.parent / "adapter_config.json").write_text("{}")
    return load_adapter(path.parent)


@pytest.mark.parametrize(
    "read", [Basis.load, read_delta_lengths, Frame.load, list_tensors, _adapter]
)
def test_tensors_with_a_header_that_takes_all_memory_never_reach_the_library(
    tmp_path, monkeypatch, read
):
    def refuse(*_, **options):
        pytest.fail("the library was called")

    for module in [module for name, module in sys.modules.items() if name.startswith("assay.")]:
        for entry in {"safe_open", "load_file"} & set(vars(module)):
            monkeypatch.setattr(module, entry, refuse)
    name = "adapter_model.safetensors" if read is _adapter else "model.safetensors"
    for header, size in ((2**26, 2**27), (2**62, 100), (0, 0)):
        with (tmp_path / name).open("wb") as file:  # as a sparse file it takes no disk
            file.write(header.to_bytes(8, "little"))
            file.truncate(size or 2**33)
        if size or read is not list_tensors:  # of which a checkpoint may be as large
            with pytest.raises(AssayError):
                read(tmp_path if read is list_tensors else tmp_path / name)
