"""assay: measure what a language model really computed, and what its training really learns.

Two instruments on one foundation:

- :mod:`assay.poc` proves how much work a model on given hardware did, and checks such proofs.
- :mod:`assay.vhack` finds the gradient directions along which training would learn to cheat.
"""

import importlib
from typing import TYPE_CHECKING, Any

from assay._version import __version__
from assay.errors import AssayError

if TYPE_CHECKING:
    from assay import models as models
    from assay import poc as poc
    from assay import stats as stats
    from assay import streams as streams
    from assay import vhack as vhack
    from assay.models import load_model as load_model

__all__ = ["AssayError", "__version__", "load_model", "models", "poc", "stats", "streams", "vhack"]

_FLOORS = {"models", "poc", "stats", "streams", "vhack"}


def __getattr__(name: str) -> Any:
    """Import a floor on first use: ``import assay`` and ``assay --help`` do not wait for torch."""
    if name in _FLOORS:
        return importlib.import_module(f"assay.{name}")
    if name == "load_model":
        return importlib.import_module("assay.models").load_model
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
