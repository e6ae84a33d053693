"""A stand-in for torchvision, without which vLLM imports no model that reads images, not even to serve text alone.

vLLM's package for CPUs is used without torchvision, whose wheel does not load beside that build of torch. The stand-in
has every name and no function: a model that touched an image would fail.
"""

import importlib.util
import os
import sys
from pathlib import Path

MODULES = ("io", "transforms", "transforms/functional", "transforms/v2", "transforms/v2/functional")
SOURCE = """
__path__ = {path!r}
__version__ = "0"


class Anything(type):
    def __getattr__(cls, name):
        return named(name)


def named(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {{}})


__getattr__ = named
"""


def stand_in(folder: Path) -> None:
    """Let this process and those that it starts import the stand-in, unless torchvision is there."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("", *MODULES):
        place = folder / "torchvision" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(SOURCE.format(path=[str(place)]))
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))
