"""The interpreter that runs programs, and the files of this machine that a program can read."""

import os
import sys
import sysconfig
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
ROOTS = ("/bin", "/lib", "/lib32", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
LINKER_CACHE = "/etc/ld.so.cache"
SINGLES = (LINKER_CACHE, "/usr/lib/locale")
PARTS = ("bin", "sbin", "lib", "lib32", "lib64")
_PACKAGES = ("site-packages", "dist-packages")

# What runs inside is text for a bare interpreter, which cannot import this package: the sandbox
# does not show it. The loader makes modules of the parts that the main text imports.
_HERE = Path(__file__).parent
_LOADER = """\
import sys, types
for name, text in {parts!r}.items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), sys.modules[name].__dict__)
"""
_IMPORTED = ("confinement", "one_thread", "scratch")


def interpreter() -> str:
    """Return the path of the interpreter itself, not of the link of a virtual environment."""
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


def python(*arguments: str) -> list[str]:
    """Return the command line of a bare interpreter, without installed packages."""
    return [interpreter(), "-I", "-S", "-B", *arguments]


@cache
def inside() -> str:
    """Return the source text of what runs inside, see `assay.vhack.environment.inside`."""
    parts = {
        f"{__package__}.{name}": (_HERE / f"{name}.py").read_text(encoding="utf-8")
        for name in _IMPORTED
    }
    return _LOADER.format(parts=parts) + (_HERE / "inside.py").read_text(encoding="utf-8")


def prefixes() -> list[str]:
    """Return the directories that hold the programs and libraries which the interpreter needs."""
    return ["/usr", "/usr/local", str(Path(sys.base_prefix).resolve())]


@cache
def shown() -> list[str]:
    """Return the directories that bubblewrap shows, none of them inside another."""
    folders = {str(Path(prefix) / part) for prefix in prefixes() for part in PARTS}
    folders |= {str(Path(interpreter()).parent), *ROOTS}
    real = {path for path in folders if Path(path).is_dir() and not Path(path).is_symlink()}
    return sorted(
        path for path in real if not any(str(above) in real for above in Path(path).parents)
    )


@cache
def hidden() -> list[str]:
    """Return the directories of installed packages below `shown`, which are shown empty."""
    packages: list[str] = []
    pending = list(shown())
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (packages if entry.name in _PACKAGES else pending).append(entry.path)
    return sorted(packages)


def standard_library() -> list[str]:
    """Return the directories of the standard library and of its extension modules."""
    names = (sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED"))
    return sorted({str(Path(name).resolve()) for name in names if name and Path(name).is_dir()})


def library_folders() -> list[str]:
    """Return the directories in which the dynamic linker looks for shared libraries."""
    folders = {Path(prefix) / part for prefix in ("/", *prefixes()) for part in PARTS[2:]}
    folders |= {folder / (sysconfig.get_config_var("MULTIARCH") or "") for folder in folders}
    return sorted({str(folder.resolve()) for folder in folders if folder.is_dir()})


def readable() -> list[str]:
    """Return the files and directories that Landlock shows: standard library, shared libraries.

    A rule of Landlock holds for all that lies below a directory, without exception. So the entries
    of a directory that may hold installed packages are named one by one.
    """
    entries = [path for folder in standard_library() for path in Path(folder).iterdir()]
    libraries = [path for folder in library_folders() for path in Path(folder).glob("*.so*")]
    return [
        *SINGLES,
        *(str(path) for path in entries if path.name not in _PACKAGES),
        *(str(path) for path in libraries if path.is_file()),
    ]


def landlock_setup() -> dict[str, object]:
    """Return the files that a fork server can read, and the directories for its jobs among them.

    Raises:
        OSError: Temporary files would lie where every program can read.
    """
    folders = [*standard_library(), *library_folders(), *DEVICES, *SINGLES]
    if any(map(Path(tempfile.gettempdir()).resolve().is_relative_to, folders)):
        raise OSError("temporary files lie among the libraries")
    return {"readable": [*readable(), *DEVICES], "folders": folders}
