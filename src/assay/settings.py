"""Settings classes: every field is declared once, with meaning, default and bounds.

``assay.cli`` makes the options and configuration keys of a command from such a class, and
docs/configuration.md is generated from it::

    class Plan(Settings):
        nonces: int = Field(1024, ge=2, description="Nonces per block.")        # --nonces 1024
        blocks: Names = Field(("a", "b"), description="Block hashes.")          # --blocks a,b
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, core_schema
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from assay.errors import UsageError

NUMBER_FORMATS = ("float8", "float8-block", "int8-rows", "int4-groups")
"""Formats in eight or four bits that the weights of a model may have: as they are stored, or
rounded to ``float8``.
"""
NEAR = 0.72
"""Similarity from which on a word may be the one that was meant."""

IN_WORDS = {
    "int_parsing": "a whole number such as 64",
    "int_from_float": "a whole number such as 64",
    "int_parsing_size": "a smaller whole number",
    "float_parsing": "a number such as 0.1, without a sign for percent",
    "bool_parsing": "true or false",
}
"""What is wanted instead of values that cannot be read, by pydantic's names of errors."""


@dataclass(frozen=True)
class Flag:
    """Metadata of a field: how a command line writes it; a plain text is the unit alone.

    Args:
        names: Names of the flag, such as ``("-o", "--output")``; empty stands for the usual one.
        variable: Environment variable, such as ``ASSAY_MODEL``.
        secret: Whether errors must not show the value.
        unit: What a value is or counts, such as ``SECONDS``, for the help.
        argument: Whether the field is a positional argument.
        file: Whether the value is a file that is written: a command sees first that it can be.
        reads: Module and name of what reads the file that is named, without torch: a command sees
            first that it can.
    """

    names: tuple[str, ...] = ()
    variable: str | None = None
    secret: bool = False
    unit: str = ""
    argument: bool = False
    file: bool = False
    reads: str = ""


@dataclass(frozen=True)
class Spelling:
    """Metadata of a field that is written as one word in flags and configuration files.

    Args:
        read: Turns the text into the value; raises ValueError, saying what is wanted.
        show: Turns the value into the text.
        unit: What stands for the text in a help.
    """

    read: Callable[[str], Any]
    show: Callable[[Any], str]
    unit: str = "WORDS"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return a schema that reads text before the field's own type is checked."""
        return core_schema.no_info_before_validator_function(
            lambda value: self.read(value) if isinstance(value, str) else value, handler(source)
        )


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


Names = Annotated[tuple[str, ...], Spelling(_split, ",".join)]
"""Words that are separated by commas where they are written as text."""


class Settings(BaseSettings):
    """Base of settings: immutable, checked when they are made, and without unknown names.

    A value comes from the arguments alone, or else from the environment where a subclass has an
    ``env_prefix``.

    Raises:
        UsageError: A value has the wrong type or is out of range, or a name is unknown.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, env_ignore_empty=True
    )
    has_flags: ClassVar[bool] = True
    """Whether a command line sets the fields; an error names their variables otherwise."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _usage_error(type(self), error) from None
        except SettingsError as error:  # a variable whose text is no value of its kind
            raise UsageError(
                str(error), wanted="JSON, where a setting has parts", do="correct or unset it"
            ) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values; a prefix of variables adds the environment."""
        if settings_cls.model_config.get("env_prefix"):
            return init_settings, Variables(settings_cls)
        return (init_settings,)

    def values_for(self, kind: type) -> dict[str, Any]:
        """Return the values that a dataclass has fields for, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(kind)
            if field.name in type(self).model_fields
        }

    def refuse(
        self, names: Iterable[str], beside: str, *, wanted: str, otherwise: str = ""
    ) -> None:
        """Refuse fields that the user stated; a variable of the environment is for all commands.

        Args:
            names: Names of the fields.
            beside: What they do not go with, as a user wrote it.
            wanted: What would have been right; ``{flag}`` stands for the field.
            otherwise: What follows the advice to leave the field out.
        """
        for name in names:
            common = os.environ.get(self.environment_name(name) or "")
            if name in self.model_fields_set and str(getattr(self, name)) != common:
                flag = self.spelling(name)
                raise UsageError(
                    f"{flag} with {beside}",
                    wanted=wanted.format(flag=flag),
                    do=f"leave {flag} out{otherwise}",
                    field=name,
                )

    @classmethod
    def flag(cls, field: str) -> Flag:
        """Return how a command line writes a field, from all that is said of it."""
        merged: dict[str, Any] = {"names": (f"--{field.replace('_', '-')}",)}
        for entry in reversed(cls.model_fields[field].metadata):
            stated = (
                {"unit": entry}
                if isinstance(entry, str)
                else vars(entry)
                if isinstance(entry, Flag)
                else {}
            )
            merged |= {name: value for name, value in stated.items() if value}
        return Flag(**merged)

    @classmethod
    def spelling(cls, field: str) -> str:
        """Return how a user writes a field: its long flag, or the name of its argument in
        capitals.
        """
        flag = cls.flag(field)
        return field.upper() if flag.argument else flag.names[-1]

    @classmethod
    def environment_name(cls, field: str) -> str | None:
        """Return the variable that sets a field, or None for a field without one."""
        flag = cls.flag(field)
        prefix = cls.model_config.get("env_prefix")
        return (
            flag.variable
            or (prefix and f"{prefix}{flag.names[-1].lstrip('-').replace('-', '_').upper()}")
            or None
        )


class Variables(EnvSettingsSource):
    """Values of the environment, each by :meth:`Settings.environment_name` of its field."""

    settings_cls: type[Settings]

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the text of a field's variable or None, the name of the field, and False."""
        variable = self.settings_cls.environment_name(field_name)
        return self.env_vars.get(variable.lower()) if variable else None, field_name, False


def words_of(annotation: Any) -> list[Any]:
    """Return the words of a ``Literal``, alone or beside None."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in words_of(part)]


def _usage_error(kind: type[Settings], error: ValidationError) -> UsageError:
    """Return the first fault of a validation in three parts, naming the flag."""
    fault: ErrorDetails = error.errors(include_url=False)[0]
    name = next((str(place) for place in fault["loc"]), "")
    if (field := kind.model_fields.get(name)) is None:
        close_names = get_close_matches(name, kind.model_fields, cutoff=NEAR)
        return UsageError(
            f"a setting {name!r}",
            wanted=f"a field of {kind.__name__}",
            do=f"did you mean {close_names[0]}?"
            if close_names
            else f"see help({kind.__module__}.{kind.__name__})",
        )
    flag = kind.spelling(name)
    variable = kind.environment_name(name)
    if variable and not kind.has_flags:
        flag = variable
        variable = None
    if fault["type"] == "missing":
        return UsageError(f"no {flag}", wanted=field.description or "a value", do=f"pass {flag}")
    expected = IN_WORDS.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")
    expected = expected.removeprefix("Value error, ")
    words = words_of(field.annotation) or re.findall(r"'([^']+)'", expected)
    near = get_close_matches(str(fault["input"]).lower(), map(str, words), cutoff=NEAR)
    shown = fault["input"] if isinstance(fault["input"], str) else repr(fault["input"])
    correct = f"correct {flag}{f' or {variable}' if variable else ''}"
    return UsageError(
        flag if kind.flag(name).secret else f"{flag} {shown:.60}",
        wanted=expected,
        do=f"did you mean {flag} {near[0]}?"
        if near
        else correct + ("" if field.is_required() else ", or leave it out"),
    )
