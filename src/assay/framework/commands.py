"""Commands made from settings classes: options, environment, configuration file, help, errors.

A command is a function of objects of settings classes. Every field of a class is a key of the
configuration file, and the fields that the command names are options too. A value comes from the
command line, else from the variable of its field, else from the file.
"""

import errno
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import filterfalse
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource, augment_usage_errors

from assay.devices import check_device
from assay.errors import AssayError, UsageError
from assay.files.references import check_reference
from assay.files.storage import check_new_file
from assay.framework.advice import in_assay_words, nearest
from assay.framework.configuration import own_table
from assay.framework.interruption import Stopped
from assay.framework.lazy_imports import imported, not_installed
from assay.framework.output import loading_bar, say
from assay.framework.results import is_result, refuse_own_sources
from assay.framework.setting import Setting
from assay.framework.variables import unknown
from assay.settings import Settings, Variables

CONTINUES = "what is done is kept, and the same command continues it"


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
        return [imported(kind) if isinstance(kind, str) else kind for kind in self._kinds]

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

    def without_flag(self, name: str, words: Sequence[str]) -> str:
        """Return what to do about a field that has no flag: where else it is written."""
        on_the_line = "" if self.settings[name].flag.secret else f"--set {name}=…, or "
        return f"write {on_the_line}`{name} = …` under [{'.'.join(words)}] in a file for --config"

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
        with augment_usage_errors(ctx):  # the parser alone does not say whose --help to see
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
            raise not_installed(error) from error
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
        chosen = {name: value for instance in instances for name, value in instance}
        may_replace = "overwrite" not in chosen
        for name in (name for name in values if self.settings[name].flag.file):
            check_new_file(chosen[name], overwrite=chosen.get("overwrite", may_replace))
            if may_replace and chosen[name].exists():
                flag = self.settings[name].spelling
                if not is_result(chosen[name]):
                    raise UsageError(
                        f"{chosen[name]} exists, and is no result of this command",
                        wanted="a new name",
                        do=f"choose another with {flag}",
                    )
                say(f"warning: {chosen[name]} exists, and the result will replace it ({flag})")
        for name, setting in self.settings.items():
            setting.check_files(chosen[name])

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
                fault.do += f"; {self.without_flag(name, words)}"
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
        return f"write {flag} in its place" if flag else nearest(word, choices, else_do)


def in_three_parts(error: click.UsageError) -> UsageError:
    """Return an error of click's parser with what was seen, wanted and to do."""
    context = error.ctx
    name = context.command_path if context else "assay"
    look = f"see {name} --help"
    if isinstance(error, click.NoSuchOption) and context:
        command = context.command
        flags = [flag for option in command.get_params(context) for flag in option.opts]
        if not isinstance(command, Command):
            do = nearest(error.option_name, flags, look)
        elif key := command.key_of(error.option_name):
            do = command.without_flag(key, name.split()[1:])
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


def _warn_of_variables(settings: Iterable[Setting]) -> None:
    """Name the variables that begin as those of assay and that no command reads."""
    names = (setting.kind.environment_name(setting.name) for setting in settings)
    for name, near in unknown(filter(None, names)).items():
        hint = f"did you mean {near}?" if near else "docs/configuration.md has all names"
        say(f"warning: {name} is set, but no command reads it: {hint}")
