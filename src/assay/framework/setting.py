"""A field of a settings class as a command shows and reads it."""

from pathlib import Path
from typing import Any, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from assay.errors import AssayError
from assay.framework.lazy_imports import imported
from assay.settings import Settings, Spelling, words_of

LONG = 2**22
"""Bytes of a file that takes long to read."""


class Setting:
    """A field of a settings class, as a command shows and reads it."""

    def __init__(self, kind: type[Settings], name: str) -> None:
        self.kind = kind
        self.name = name
        self.field: FieldInfo = kind.model_fields[name]
        self.flag = kind.flag(name)
        self.spelling = kind.spelling(name)
        self.types = (self.field.annotation, *get_args(self.field.annotation))
        self.text = next(
            (entry for entry in self.field.metadata if isinstance(entry, Spelling)), None
        )

    @property
    def repeats(self) -> bool:
        """Whether the option may be given several times."""
        return self.text is None and any(get_origin(kind) is tuple for kind in self.types)

    @property
    def default(self) -> Any:
        """The default as a user writes it; None for a setting without one."""
        value = (
            None if self.field.is_required() else self.field.get_default(call_default_factory=True)
        )
        if self.text is not None and value is not None:
            return self.text.show(value)
        return (
            str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
        )

    @property
    def help(self) -> str:
        """The description, then the default."""
        is_none = self.default is None or self.default is False or self.default in ("", [])
        shown = "" if is_none else f"  [default: {self.default}]"
        return (
            f"{self.field.description or ''}{'  [required]' if self.field.is_required() else shown}"
        )

    @property
    def unit(self) -> str:
        """What stands for a value in the help: its unit, its few words, or the end of the name."""
        words = words_of(self.field.annotation)
        unit = self.flag.unit or (
            "|".join(map(str, words)) if 1 < len(words) < 6 else self.text and self.text.unit
        )
        return unit or (
            "DIRECTORY"
            if (self.field.description or "").startswith("Directory")
            else "FILE"
            if Path in self.types
            else self.name.split("_")[-1].upper()
        )

    def parameter(self, *, hidden: bool) -> click.Parameter:
        """Return the option or argument of click, which takes any text: the settings check values.

        Args:
            hidden: Whether the help leaves the option out.
        """
        if self.flag.argument:
            words = f"{self.spelling}{'...' * self.repeats}"
            return click.Argument(
                [self.name],
                nargs=-1 if self.repeats else 1,
                required=False,
                metavar=words if self.field.is_required() else f"[{words}]",
            )
        options: dict[str, Any] = {"multiple": self.repeats, "type": str, "metavar": self.unit}
        options = {"is_flag": True} if self.field.annotation is bool else options
        return click.Option([self.name, *self.flag.names], help=self.help, hidden=hidden, **options)

    def read(self, value: Any) -> Any:
        """Return a value of a command line or a file as the settings class takes it."""
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.field.annotation is str
        ):
            return str(value)
        if isinstance(value, bool) and bool not in self.types:
            return str(value).lower()  # pydantic would take true as 1
        return next((word for word in words_of(self.field.annotation) if str(word) == value), value)

    def check_files(self, value: Any) -> None:
        """Refuse files that cannot be read, before torch is imported; the command reads a long one
        once.
        """
        if not self.flag.reads or value is None:
            return
        for path in value if isinstance(value, tuple) else [value]:
            if path.is_file() and path.stat().st_size > LONG:
                continue
            try:
                imported(self.flag.reads)(path)
            except AssayError as error:
                error.field = error.field or self.name
                raise
