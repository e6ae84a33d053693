"""Commands made from settings classes: options, environment, configuration file, help, errors.

A command is a function of objects of settings classes. Every field of a class is a key of the
configuration file, and the fields that the command names are options too. A value comes from the
command line, else from the variable of its field, else from the file.
"""

import errno
import gc
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points, requires
from itertools import filterfalse
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from assay.devices import check_device
from assay.errors import (
    AssayError,
    BackendUnavailable,
    DataError,
    StorageError,
    UsageError,
    how_to_install,
)
from assay.files.references import check_reference
from assay.files.storage import check_new_file, storage_error
from assay.files.toml import read_toml
from assay.framework.output import loading_bar, say
from assay.framework.variables import unknown
from assay.settings import NEAR, Settings, Spelling, Variables, words_of

EXTENSIONS = "assay.commands"
"""Entry-point group of commands that other packages add, by the words that call them: ``poc
experiment``.
"""
EXTRAS = ("serve", "train")  # in which the packages are that a command may miss

CONTINUES = "what is done is kept, and the same command continues it"
F = TypeVar("F", bound=Callable[..., Any])


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised as an exception so that files and pools can clean up.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.resumable = False


@contextmanager
def resumable() -> Iterator[None]:
    """Say of a signal or a full disk inside that what was done is kept."""
    try:
        yield
    except (Stopped, OSError, AssayError) as stop:
        vars(stop)["resumable"] = True
        raise


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
        """Refuse a file that cannot be read, is a pipe or is too long, before torch is imported."""
        for path in (
            (value if isinstance(value, tuple) else [value]) if self.flag.reads and value else ()
        ):
            if (
                not path.exists()
                or path.is_dir()
                or (path.is_file() and path.stat().st_size <= 2**22)
            ):
                try:
                    _imported(self.flag.reads)(path)
                except AssayError as error:
                    error.field = error.field or self.name
                    raise


class Command(click.Command):
    """A command of ``assay``: a function of settings objects that returns an exit code or None.

    Args:
        name: Name of the command.
        function: What it does; a parameter ``as_json`` gives it the flag ``--json``.
        kinds: Settings classes, or the module and name of one that takes long to import. If several
            have a field of one name, the last of them gets the value.
        shown: Fields whose options are in the help, separated by spaces; all by default.
        rare: Further fields with options, which the help leaves to ``--set``.
        panel: Heading under which the help of the group lists the command.
        example: A command line for the help.
        resumable: Whether an interrupted command continues when it is repeated.
        instead: Settings of commands beside it that it does not have, each with the flag that takes
            its place.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., int | None],
        kinds: Sequence[type[Settings] | str] = (),
        *,
        shown: str = "",
        rare: str = "",
        panel: str = "Commands",
        example: str = "",
        resumable: bool = False,
        instead: Mapping[str, str] | None = None,
    ) -> None:
        text = inspect.cleandoc(function.__doc__ or "")
        super().__init__(
            name, help=text, short_help=text.splitlines()[0], epilog=f"Example: {example}"
        )
        self.function = function
        self.panel = panel
        self.resumable = resumable
        self.instead = instead or {}
        self._kinds = kinds
        self._shown = shown.split()
        self._rare = rare.split()

    @cached_property
    def kinds(self) -> list[type[Settings]]:
        """The settings classes."""
        return [_imported(kind) if isinstance(kind, str) else kind for kind in self._kinds]

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The fields of the settings classes by name."""
        return {
            name: Setting(kind, name)
            for kind in self.kinds
            for name, field in kind.model_fields.items()
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Settings))
        }

    @cached_property
    def keys(self) -> dict[str, str]:
        """The fields by the names that a configuration file may use: their own and their flags'."""
        flags = {setting.spelling: name for name, setting in self.settings.items()}
        return {flag.lstrip("-").replace("-", "_"): name for flag, name in flags.items()} | {
            name: name for name in self.settings
        }

    def is_shown(self, name: str) -> bool:
        """Return whether a field is an argument, or an option in the help."""
        return name in (self._shown or self.settings) or self.settings[name].flag.argument

    def is_option(self, name: str) -> bool:
        """Return whether a field has a flag of its own, and is not only for ``--set`` and files."""
        return self.is_shown(name) or name in self._rare

    def key_of(self, flag: str) -> str | None:
        """Return the key of the configuration file that a word beginning with dashes stands for."""
        names = filterfalse(self.is_option, self.settings)
        return next((name for name in names if flag in self.settings[name].flag.names), None)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, which are made when they are first asked for."""
        if not self.params:
            ordered = sorted(self.settings, key=lambda name: [*self._shown, name].index(name))
            self.params += [
                self.settings[name].parameter(hidden=not self.is_shown(name))
                for name in filter(self.is_option, ordered)
            ]
            if self.settings:
                self.params += [
                    click.Option(
                        ["assignments", "--set"],
                        help="Another setting; repeatable.",
                        multiple=True,
                        metavar="NAME=VALUE",
                    ),
                    click.Option(
                        ["--config"],
                        help="TOML file with further settings.",
                        type=click.Path(path_type=Path),
                        metavar="FILE",
                        envvar="ASSAY_CONFIG",
                    ),
                ]
            if "as_json" in inspect.signature(self.function).parameters:
                self.params.append(
                    click.Option(["as_json", "--json"], is_flag=True, help="Print one JSON object.")
                )
        return super().get_params(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how to get the other settings, and the example."""
        keys = sum(not self.is_shown(name) for name in self.settings)
        formatter.write_paragraph()
        if keys:
            formatter.write_text(
                f"{keys} more setting{'s' * (keys > 1)} by --set or --config: assay config "
                f"{ctx.command_path.partition(' ')[2]}"
            )
        formatter.write(f"{self.epilog}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Warn of options that are given more than once; the last value counts."""
        order = [] if ctx.resilient_parsing else self.make_parser(ctx).parse_args([*args])[2]
        for option in dict.fromkeys(
            option for option in order if order.count(option) > 1 and not option.multiple
        ):
            say(f"warning: {option.opts[-1]} is given more than once, and the last value counts")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command with its settings, name the flag in errors, and exit with its code."""
        words = ctx.command_path.split()[1:]
        values, options = self.gather(ctx, words)
        try:
            instances = self.build(values)
            self.check_files(instances, values)
            with loading_bar():
                ctx.exit(self.function(*instances, **options) or 0)
        except Stopped as stop:
            stop.resumable |= self.resumable
            raise
        except BrokenPipeError:
            raise
        except ModuleNotFoundError as error:  # a command imports what it runs
            raise _not_installed(error) from error
        except OSError as error:
            raise self._advised(in_assay_words(error), error, words) from error
        except AssayError as error:
            self._advised(error, error.__cause__ or error, words)
            raise

    def gather(
        self, ctx: click.Context, words: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, bool]]:
        """Return the values of a call by field, of the file, the variables and the command line,
        and ``as_json`` where the function takes it.
        """
        table = own_table(ctx.params.get("config"), ctx, words)
        as_json = table.pop("json", False)
        if not isinstance(as_json, bool):
            raise UsageError(
                f"json = {as_json!r:.80} in the configuration of {ctx.command_path}",
                wanted="true or false",
                do="correct the file (--config)",
            )
        _warn_of_variables(self.settings.values())
        values = self._named(table, "the configuration file")
        for kind in self.kinds:
            values |= self._of(kind, Variables(kind)())
        values |= self._named(self.assigned(ctx.params.get("assignments", ())), "--set")
        values |= {
            name: value
            for name, value in ctx.params.items()
            if name in self.settings
            and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        values = {
            name: self.settings[name].read(value)
            for name, value in values.items()
            if value not in (None, ())
        }
        takes_json = "as_json" in ctx.params
        return values, {"as_json": ctx.params["as_json"] or as_json} if takes_json else {}

    def _of(self, kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those values whose fields are of a settings class."""
        return {n: v for n, v in values.items() if self.settings[n].kind is kind}

    def assigned(self, texts: Iterable[str]) -> dict[str, Any]:
        """Return what each ``--set NAME=VALUE`` says by name, as a configuration file would."""
        values: dict[str, Any] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            setting = self.settings.get(self.keys.get(name.replace("-", "_"), ""))
            if not equals:
                raise UsageError(
                    f"--set {text:.80}",
                    wanted="a setting and its value, such as --set seed=7",
                    do="write NAME=VALUE without spaces around the sign",
                )
            if setting and setting.flag.secret:
                raise UsageError(
                    f"--set {name}",
                    wanted="no secret on a command line, which other users can read",
                    do=f"write `{name}` in a file for --config, or use a variable",
                )
            values[name] = [*values.get(name, []), value] if setting and setting.repeats else value
        return values

    def build(self, values: Mapping[str, Any]) -> list[Settings]:
        """Return the objects of the settings classes, once what needs no torch is checked."""
        refuse_own_sources(self.settings, values)
        for name in {"model", "reference"} & values.keys():
            check_reference(str(values[name]), with_weights=name == "model")
        instances = [kind(**self._of(kind, values)) for kind in self.kinds]
        if "device" in values:
            check_device(values["device"])
        return instances

    def check_files(self, instances: Sequence[Settings], values: Mapping[str, Any]) -> None:
        """Refuse results that cannot be written and files that cannot be read, before torch."""
        may_replace = "overwrite" not in self.settings
        for name in (name for name in values if self.settings[name].flag.file):
            check_new_file(values[name], overwrite=bool(values.get("overwrite", may_replace)))
            if may_replace and Path(values[name]).exists():
                flag = self.settings[name].spelling
                if not _is_result(Path(values[name])):
                    raise UsageError(
                        f"{values[name]} exists, and is no result of this command",
                        wanted="a new name",
                        do=f"choose another with {flag}",
                    )
                say(f"warning: {values[name]} exists, and the result will replace it ({flag})")
        for setting in self.settings.values():
            setting.check_files(getattr(instances[self.kinds.index(setting.kind)], setting.name))

    def _advised(self, fault: AssayError, cause: BaseException, words: Sequence[str]) -> AssayError:
        """Return an error that names the flag or key that it is about, and what a repetition does.

        A flag that is not an option becomes its key of the configuration file.
        """
        faulty = self.settings.get(fault.field)
        if faulty is not None and faulty.spelling not in str(fault):
            fault.do += f" ({faulty.spelling})"
        for name in filterfalse(self.is_option, self.settings):
            flag = rf"{re.escape(self.settings[name].spelling)}(?![\w-])"
            fault.seen = re.sub(flag, f"`{name}`", fault.seen)
            fault.do, count = re.subn(flag, f"`{name}`", fault.do)
            if count:
                on_the_line = "" if self.settings[name].flag.secret else f"--set {name}=…, or "
                table = ".".join(words)
                fault.do += f"; write {on_the_line}`{name}` under [{table}] of --config"
        full_disk = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EFBIG)
        if full_disk and (self.resumable or "resumable" in vars(fault) | vars(cause)):
            fault.do += f"; {CONTINUES}"
        return fault

    def _named(self, table: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Return the values of a configuration file or of ``--set`` by field."""
        for key in table:
            if key.replace("-", "_") not in self.keys:
                raise UsageError(
                    f"{key} in {source} is not a setting of {self.name}",
                    wanted="one of " + ", ".join(sorted(self.settings)),
                    do=self.advise(key, self.keys, "remove it"),
                )
        return {self.keys[key.replace("-", "_")]: value for key, value in table.items()}

    def advise(self, word: str, choices: Iterable[str], else_do: str) -> str:
        """Return what to do about a flag or key that the command does not have."""
        flag = self.instead.get(word.lstrip("-").replace("-", "_"))
        return f"write {flag} in its place" if flag else _nearest(word, choices, else_do)


class Group(click.Group):
    """A group of commands, in whose help they stand under their panels.

    Args:
        path: Words that call the group, such as ``poc ledger``; empty for the root.
        help: What the commands are for.
        panel: Heading under which the help of the group above lists this one.
        elsewhere: Names of commands that another package adds where it is installed.
    """

    def __init__(
        self,
        path: str,
        help: str,
        *,
        panel: str = "Commands",
        elsewhere: Collection[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            path.rpartition(" ")[2] or "assay", help=help, no_args_is_help=True, **options
        )
        self.path = path
        self.panel = panel
        self.elsewhere = elsewhere

    def add(self, name: str, *kinds: type[Settings] | str, **options: Any) -> Callable[[F], F]:
        """Return a decorator that makes a function a command of the group; see :class:`Command`."""

        def decorate(function: F) -> F:
            self.add_command(Command(name, function, kinds, **options))
            return function

        return decorate

    def group_of(self, name: str, help: str, **options: Any) -> "Group":
        """Return a new group inside this one."""
        group = Group(self._words(name), help, **options)
        self.add_command(group)
        return group

    def _words(self, name: str) -> str:
        return f"{self.path} {name}".strip()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, those of other packages included that are installed."""
        placed = (
            point.name.rpartition(" ")
            for point in entry_points(group=EXTENSIONS)
            if "-" not in point.name
        )
        return [*self.commands, *sorted(name for path, _, name in placed if path == self.path)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, also one of another package."""
        if cmd_name in self.commands or cmd_name not in (*self.elsewhere, *self.list_commands(ctx)):
            return self.commands.get(cmd_name)
        loaded: click.Command = extension(self._words(cmd_name))
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called; name the nearest one where there is no such."""
        if self.get_command(ctx, args[0]) is None:
            places = _places(ctx.find_root().command, args[0])
            look = f"see {ctx.command_path} --help"
            raise UsageError(
                args[0],
                wanted=f"a command of {ctx.command_path}",
                do=f"did you mean assay {places[0]}? Else {look}"
                if places
                else _nearest(args[0], self.list_commands(ctx), look),
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None
            panel = getattr(command, "panel", "Commands") if name in self.commands else "Research"
            panels.setdefault(panel, []).append((name, command.get_short_help_str(60)))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def _places(command: click.Command, word: str, path: str = "") -> list[str]:
    """Return the words that call the groups and commands of a name, below a command."""
    places = []
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        words = f"{path} {name}".strip()
        places += [words] if name == word else _places(inner, word, words)
    return places


def extension(words: str) -> Any:
    """Return what an installed package registers as a command under these words."""
    for point in entry_points(group=EXTENSIONS, name=words):
        return point.load()
    raise UsageError(
        f"assay {words}, which the package assay does not have",
        wanted="the package assay-research",
        do="install assay-research (research/ of the repository)",
    )


def own_table(path: Path | None, context: click.Context, words: Sequence[str]) -> dict[str, Any]:
    """Return a command's table of a configuration file, such as ``[poc.prove]``; else empty."""
    if path is None:
        return {}
    try:
        # Not by the source of pydantic-settings, whose parser bounds neither keys nor numbers, and
        # which takes a missing file for an empty one.
        tables = read_toml(path)
    except DataError as error:
        error.do += " (--config)"
        raise
    command: click.Command | None = context.find_root().command
    for word in words:
        assert isinstance(command, Group)
        names = command.list_commands(context)
        for key, value in tables.items():
            if key not in names or not isinstance(value, dict):
                raise UsageError(
                    f"configuration file {path}: {key} is not a "
                    f"{'command' if isinstance(value, dict) else 'table'} of {command.name}",
                    wanted="a TOML file with a table per command, as `assay config COMMAND` "
                    "prints it",
                    do="correct the file, or leave --config out",
                )
        tables = tables.get(word, {})
        command = command.get_command(context, word)
    return tables


def refuse_own_sources(settings: Mapping[str, Setting], values: Mapping[str, Any]) -> None:
    """Refuse a result that would replace a file from which it is made, or another result."""
    for result in (name for name in values if name == "output" or settings[name].flag.file):
        flag = settings[result].spelling
        for name, value in values.items():
            texts = value if isinstance(value, list | tuple) else [value]
            # A calibration that is merged into may be the result: it grows.
            if name not in (result, "merge") and any(
                isinstance(text, str) and _same_file(values[result], text) for text in texts
            ):
                raise UsageError(
                    f"{flag} {values[result]}, which is {settings[name].spelling} too",
                    wanted="a file of its own for every result",
                    do=f"choose another name with {flag}",
                )


def _is_result(path: Path) -> bool:
    """Whether a file is empty, a page, or one line of JSON that names a form of assay."""
    with path.open("rb") as file:
        first = file.readline()
        return not first or first.startswith(b"<!") or (b'"assay.' in first and not file.read(1))


def _same_file(result: str, source: str) -> bool:
    """Return whether two paths are one file, or will be; a directory may hold both."""
    try:
        return Path(result).resolve() == Path(source).resolve() and not Path(result).is_dir()
    # A value that is no path, or links that lead to themselves.
    except (OSError, TypeError, ValueError, RuntimeError):
        return False


def _nearest(word: str, choices: Iterable[str], else_do: str) -> str:
    """Return what to do about a word that is not known."""
    near = get_close_matches(word, choices, n=1, cutoff=NEAR)
    return f"did you mean {near[0]}? Else {else_do}" if near else else_do


def in_assay_words(error: OSError) -> StorageError:
    """Return an error of the operating system in the three parts of every error."""
    return storage_error(Path(str(error.filename or "output")), error)


def in_three_parts(error: click.UsageError) -> UsageError:
    """Return an error of click's parser with what was seen, wanted and to do."""
    context = error.ctx
    name = context.command_path if context else "assay"
    look = f"see {name} --help"
    if isinstance(error, click.NoSuchOption) and context:
        command = context.command
        flags = [flag for option in command.get_params(context) for flag in option.opts]
        if not isinstance(command, Command):
            do = _nearest(error.option_name, flags, look)
        elif key := command.key_of(error.option_name):
            on_the_line = "" if command.settings[key].flag.secret else f"--set {key}=…, or "
            table = ".".join(name.split()[1:])
            do = f"write {on_the_line}`{key} = …` under [{table}] in a file for --config"
        elif error.option_name.lstrip("-") in flags:
            do = "pass its value without the flag"
        else:
            do = command.advise(error.option_name, flags, look)
        return UsageError(error.option_name, wanted=f"a flag of {name}", do=do)
    if isinstance(error, click.BadOptionUsage):
        wants = "no value" if "not take" in error.message else "a value"
        return UsageError(error.option_name, wanted=f"{wants} behind this flag", do=look)
    return UsageError(
        f"{name}: {error.message.rstrip('.')}", wanted=f"only the arguments of {name}", do=look
    )


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    try:
        with without_collection():
            return attrgetter(name)(import_module(module))
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error


def _not_installed(error: ModuleNotFoundError) -> Exception:
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


def _warn_of_variables(settings: Iterable[Setting]) -> None:
    """Name the variables that begin as those of assay and that no command reads."""
    names = (setting.kind.environment_name(setting.name) for setting in settings)
    for name, near in unknown(filter(None, names)).items():
        hint = f"did you mean {near}?" if near else "docs/configuration.md has all names"
        say(f"warning: {name} is set, but no command reads it: {hint}")


def leaves(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Yield the words and the object of every command of the package below a group."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        elif isinstance(command, Command):
            yield (*path, name), command
