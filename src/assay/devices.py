"""Names of devices, as far as they are understood before torch is imported."""

import re
import sys
from contextlib import suppress
from ctypes.util import find_library
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from pydantic import AfterValidator, Field

from assay.errors import BackendUnavailable
from assay.settings import Flag

DEVICE_NAME = re.compile("cpu(:0)?|cuda(:[0-9]{1,4})?")


def device_name(name: str | None) -> str | None:
    """Return a device name as a field validator; a ValueError where there is no such device."""
    if name is not None and not DEVICE_NAME.fullmatch(name):
        raise ValueError("cpu, cuda or cuda:N")
    return name


def check_device(name: str, count: int | None = None) -> None:
    """Refuse a CUDA device whose number is not below ``count``, or any where torch finds none."""
    kind, _, index = name.partition(":")
    if kind != "cuda":
        return
    if count is None:
        count = 0 if _has_no_cuda() else sys.maxsize
    if int(index or 0) >= count:
        raise BackendUnavailable(
            f"device {name}, and torch finds {count} CUDA devices here",
            wanted="a device that is there",
            do="use --device cpu, or install a torch with CUDA on a machine that has one",
        )


def _has_no_cuda() -> bool:
    """Return whether torch is built for CPUs, or there is neither device nor driver; False where
    only torch knows.
    """
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return True
    return not any(
        map(glob, ("/dev/nvidia*", "/dev/nvhost*", "/dev/dxg", "/dev/kfd"))
    ) and not find_library("cuda")


Device = Annotated[
    str | None,
    AfterValidator(device_name),
    Flag(variable="ASSAY_DEVICE", unit="DEVICE"),
    Field(
        description="Device that runs the model: cpu or cuda; by default cuda where there is one."
    ),
]
"""Type of a setting that names the device of a model."""
