"""Flags of a command from a settings class, made when the command is first used: such a class may import torch."""

import gc
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

if TYPE_CHECKING:
    from assay.settings import Settings


F = TypeVar("F", bound=Callable[..., Any])


def settings(where: str, *, only: Collection[str] = ()) -> Callable[[F], F]:
    """Return a decorator for a command whose first parameter is an object of a settings class.

    The fields of the class, and those of settings inside it, become flags. The other parameters of the function stay.

    Args:
        where: Module and name of the class, such as ``assay.vhack.training:TrainSettings``.
        only: Names of the fields that become flags; by default all.
    """

    def decorate(command: F) -> F:
        def reduced(**values: Any) -> Any:
            return command(**values)

        others = list(inspect.signature(command).parameters.values())[1:]
        reduced.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
        reduced.__annotations__ = {parameter.name: parameter.annotation for parameter in others}
        reduced.__name__, reduced.__doc__, reduced.__module__ = command.__name__, command.__doc__, command.__module__
        reduced.settings = (command, where, only)  # type: ignore[attr-defined]
        return reduced  # type: ignore[return-value]

    return decorate


def complete(reduced: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function of a command with the flags of its settings class; None where it has no such class."""
    command, where, only = getattr(reduced, "settings", (None, "", ()))
    if command is None:
        return None
    module, _, name = where.partition(":")
    with without_collection():
        kind: type[Settings] = getattr(import_module(module), name)
    made = {p.name: (path, p) for path, p in _parameters(kind, ()) if path[-1] in (only or path)}

    def call(**values: Any) -> Any:
        given: dict[str, Any] = {}
        for parameter, (path, _) in made.items():
            if (value := values.pop(parameter)) is not None:
                inner = given
                for part in path[:-1]:
                    inner = inner.setdefault(part, {})
                inner[path[-1]] = value
        return command(kind(**given), **values)

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(reduced).parameters.values()]
    call.__signature__ = inspect.Signature([p for _, p in made.values()] + own)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    call.variables = tuple(_variables(kind))  # type: ignore[attr-defined]
    return call


@contextmanager
def without_collection() -> Iterator[None]:
    """Stop the garbage collector during imports, or during a command that is soon over.

    It would walk all that is there again and again while torch and transformers come in: a second of the four to five
    that they take (``python -c 'import gc; gc.disable(); import assay.poc'`` against the same without ``gc``). What
    came in stays, so it is walked later too: 1.6 of the 18 s of ``assay demo`` (``gc.callbacks``), which needs no more
    memory without it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parameters(kind: "type[Settings]", path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], inspect.Parameter]]:
    """Yield the place of every field, those of inner settings included, and the parameter that sets it."""
    from assay.settings import Settings

    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _parameters(field.annotation, (*path, name))
        else:
            yield (*path, name), _parameter(kind, name)


def _variables(kind: "type[Settings]") -> Iterator[str]:
    """Yield the variables that set fields, those without a flag and those of inner settings included."""
    from assay.settings import Settings

    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _variables(field.annotation)
        word = kind.flags(name)[-1].lstrip("-").replace("-", "_").upper()
        yield from (f"{prefix}{word}" for prefix in kind.prefixes)


def _parameter(kind: "type[Settings]", name: str) -> inspect.Parameter:
    from assay.settings import Spelling

    field, flags = kind.model_fields[name], kind.flags(name)
    parameter = flags[-1].lstrip("-").replace("-", "_")
    default = inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
    annotation, repeated = _plain(field.annotation)
    for entry in field.metadata:
        if isinstance(entry, Spelling):
            annotation, repeated = str, False
            default = default if default in (None, inspect.Parameter.empty) else entry.show(default)
    if repeated:
        annotation, default = list[annotation], None  # type: ignore[valid-type]
    option = typer.Option(*flags, help=field.description, envvar=kind.environment_name(name))
    return inspect.Parameter(
        parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation if default is not None else annotation | None, option],
    )


def _plain(annotation: Any) -> tuple[Any, bool]:
    """Return the type that a command line reads for an annotation, and whether its flag may be repeated."""
    origin, inner = get_origin(annotation), [part for part in get_args(annotation) if part is not type(None)]
    if origin is Literal:
        return type(inner[0]), False  # pydantic names the words, and the error the nearest one
    if origin is tuple:
        return inner[0], True
    if origin is not None:
        return _plain(inner[0])
    return (annotation if annotation in (int, float, bool, Path) else str), False
