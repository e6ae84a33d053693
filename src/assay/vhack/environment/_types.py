"""What a run in the sandbox is asked for, and what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Limits", "Outcome", "Result"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall clock from start to end, start of the interpreter included; CPU seconds are bounded by it too.
        memory_mib: address space of the one process, in MiB.
        output_bytes: of stdout and of stderr each; a program that writes more is stopped.
        report_bytes: of everything it returns by value.
        disk_mib: room in its working directory, in MiB; also the largest file.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    output_bytes: int = 65536
    report_bytes: int = 1 << 20
    disk_mib: int = 8


_NOTHING: Any = object()


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a program after it has run: a call, or with ``args`` None the value of a name.

    Attributes:
        target: a name at module level, or ``Class.method`` (the class is instantiated without arguments),
            or ``name.attribute``.
        args: positional arguments, of JSON types; None reads the target instead of calling it.
        equals: where given, the answer is whether ``result == equals`` by the program's own ``==``.
    """

    target: str
    args: tuple[Any, ...] | None = None
    equals: Any = _NOTHING

    def as_dict(self) -> dict[str, Any]:
        """The JSON form that is sent into the sandbox."""
        asked: dict[str, Any] = {"target": self.target, "args": None if self.args is None else list(self.args)}
        return asked if self.equals is _NOTHING else {**asked, "equals": self.equals}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to one `Call`.

    Attributes:
        kind: ``value``; ``error``, the target raised or is missing; ``opaque``, a result that is not made of plain
            builtin values; ``none``, the program ended before it was asked.
        value: the plain value, for ``value``. Tuples come back as lists, subclasses as the builtin value below them.
        name: type of the exception or of the opaque result.
    """

    kind: str
    value: Any = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What one run left behind, as seen by the parent.

    Attributes:
        returncode: exit code of the program; None where it was killed.
        stdout: what it printed, cut at the limit; bytes that are not UTF-8 are replaced.
        stderr: the same of its errors.
        timed_out: it was killed at the time limit.
        overflowed: it was killed because it printed or returned too much.
        finished: it ran to its end or left by ``sys.exit``, and the questions were asked.
        raised: name of the exception that ended it, or empty.
        outcomes: one per call.
        files: content of the files asked for that exist, text, at most 4096 characters each.
        seconds: wall clock.
        backend: ``bwrap``, ``namespaces`` or ``unsandboxed``.
    """

    returncode: int | None
    stdout: str
    stderr: str
    timed_out: bool
    overflowed: bool
    finished: bool
    raised: str
    outcomes: tuple[Outcome, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    backend: str = ""
