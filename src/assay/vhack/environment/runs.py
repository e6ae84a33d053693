"""What a run may use, what it is asked, and what it leaves behind."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from assay.errors import UsageError

Case = tuple[tuple[Any, ...], Any]
"""Arguments and expected value of one test."""

_MOST_SECONDS = 1e6  # the kernel waits for no more than 24 days
_MOST = 2**40  # of anything else: so many MiB are still a number of bytes in 64 bits

NOT_COMPARED: Any = object()
"""Stands for no value to compare an answer with; None is a value."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        seconds: Wall clock from start to end, start of the interpreter included; CPU seconds are
            bounded by it too.
        memory_mib: Address space of the one process, in MiB.
        output_bytes: Bytes of stdout and of stderr each; a program that writes more is stopped.
        report_bytes: Bytes of everything it returns by value.
        disk_mib: Room in its working directory, in MiB; also the largest file.
        program_bytes: Length of its source text in UTF-8; a longer program is not run.

    Raises:
        UsageError: A limit is not positive, or more than the kernel can hold a program to.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    output_bytes: int = 65536
    report_bytes: int = 1 << 20
    disk_mib: int = 8
    program_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        is_held = all(0 < value <= _MOST for value in asdict(self).values())
        if not is_held or self.seconds > _MOST_SECONDS:
            raise UsageError(
                f"{self}",
                wanted=f"positive limits of at most {_MOST_SECONDS:g} seconds, and {_MOST} of "
                "anything else",
                do="leave a limit out to have its default",
            )


class Bounds(TypedDict, total=False):
    """How a program is run, see `run`."""

    limits: Limits | None
    allow_unsandboxed: bool
    backend: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """A question to a program after its run: a call, or with ``args`` None a name's value.

    Attributes:
        target: A name at module level, or ``Class.method`` (the class is instantiated without
            arguments), or ``name.attribute``.
        args: Positional arguments, of JSON types; None reads the target instead of calling it.
        equals: Where it is given, the answer is whether ``result == equals`` by the program's own
            ``==``.
    """

    target: str
    args: tuple[Any, ...] | None = None
    equals: Any = NOT_COMPARED


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to one `Call`.

    Attributes:
        kind: One of ``value``; ``error``, the target raised or is missing; ``opaque``, a result
            that is not made of plain builtin values; ``none``, the program ended before it was
            asked.
        value: Plain value, for ``value``. Tuples come back as lists, subclasses as the builtin
            value below them.
        name: Type of the exception or of the opaque result.
    """

    kind: str
    value: Any = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run, as the parent observes it.

    Attributes:
        returncode: Exit code of the program; None where it was killed.
        stdout: Its output, cut at the limit; bytes that are not UTF-8 are replaced.
        stderr: Its error output, likewise.
        timed_out: Whether it was killed at the time limit.
        overflowed: Whether it was killed because it printed, returned or kept too much.
        finished: Whether it ran to its end or left by ``sys.exit``, and the questions were asked.
        raised: Name of the exception that ended it, or empty; ``ProgramTooLong`` or
            ``UnicodeEncodeError`` if it was not run.
        outcomes: One answer per call.
        files: Content of the files asked for that exist, at most 4096 characters each.
        seconds: Wall clock.
        backend: ``bwrap``, ``landlock`` or ``unsandboxed``.
    """

    returncode: int | None
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False
    overflowed: bool = False
    finished: bool = False
    raised: str = ""
    outcomes: tuple[Outcome, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    backend: str = ""
