"""Imports that a command makes when it runs: quickly, and with a name for what is missing."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pkgutil import resolve_name
from typing import Any

from assay.errors import BackendUnavailable, how_to_install

EXTRAS = ("serve", "train")  # in which the packages are that a command may miss


def imported(where: str) -> Any:
    """Return what ``module:name`` says; a BackendUnavailable where a package is missing."""
    try:
        with without_collection():
            return resolve_name(where)
    except ModuleNotFoundError as error:
        raise not_installed(error) from error


def not_installed(error: ModuleNotFoundError) -> Exception:
    """Return the error of a package that is missing, with the extra of assay that has it."""
    package = (error.name or "assay").partition(".")[0]
    if package == "assay":
        return error
    # A requirement in the metadata of assay: trl>=1.16; extra == 'train'
    of_package = re.compile(
        rf"{package.replace('_', '-')}(?![\w.-]).*extra == .({'|'.join(EXTRAS)})\b"
    )
    matches = filter(None, map(of_package.match, requires("assay") or ()))
    return BackendUnavailable(
        f"the package {error.name} is not installed",
        wanted="what the command needs beside assay itself",
        do=how_to_install(next((match[1] for match in matches), EXTRAS[0])),
    )


@contextmanager
def without_collection() -> Iterator[None]:
    """Stop the garbage collector during imports, or during a command that is soon over.

    It would walk all that is there again and again while torch and transformers come in: a second
    of the four to five that they take, and 1.6 of the 18 s of ``assay demo``, which needs no more
    memory without it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
