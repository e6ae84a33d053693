import errno
import os
import stat
import subprocess
import sys
import textwrap

import pytest

from assay.errors import StorageError, UsageError
from assay.files import storage
from assay.files.jsonl import dumps, read_jsonl
from assay.files.storage import (
    PartialFile,
    cache_folder,
    check_new_file,
    one_writer,
    write_atomic,
    write_jsonl,
)
from tests.wordings import refuses


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True
    )


def names(folder):
    return [entry.name for entry in folder.iterdir()]


def test_a_directory_has_one_writer(tmp_path):
    with (
        one_writer(tmp_path / "new"),
        refuses(StorageError, "a directory has one writer"),
        one_writer(tmp_path / "new"),
    ):
        pass
    with one_writer(tmp_path / "new"):
        pass


def test_committed_records_are_under_the_final_name_only(tmp_path):
    path = tmp_path / "proof.jsonl"
    with PartialFile(path) as file:
        file.append_lines(['{"nonce":0}'])
        file.append_lines(['{"nonce":1}', '{"nonce":2}'])
        assert names(tmp_path) == ["proof.jsonl.partial"]
        file.commit()
    assert path.read_text() == '{"nonce":0}\n{"nonce":1}\n{"nonce":2}\n'
    assert names(tmp_path) == ["proof.jsonl"]


@pytest.mark.parametrize(
    "torn", ["", '{"nonce":2', '{"nonce":2}', "\0\0\0", '{"nonce":NaN}\n{"nonce":3}\n', "\n"]
)
def test_resuming_gives_the_bytes_of_an_uninterrupted_run(tmp_path, torn):
    path = tmp_path / "proof.jsonl"
    path.with_name("proof.jsonl.partial").write_text('{"nonce":0}\n{"nonce":1}\n' + torn)
    with PartialFile(path) as file:
        intact = file.recover()
        assert intact == ['{"nonce":0}', '{"nonce":1}']
        for nonce in range(len(intact), 4):
            file.append_lines([dumps({"nonce": nonce})])
        file.commit()
    assert [record["nonce"] for _, record in read_jsonl(path)] == [0, 1, 2, 3]


def test_a_record_is_on_file_as_soon_as_it_is_appended(tmp_path):
    code = """
        import os, signal, sys
        from assay.files.storage import PartialFile
        file = PartialFile(sys.argv[1])
        file.append_lines(['{"nonce":0}'])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, str(tmp_path / "proof.jsonl")).returncode == -9
    with PartialFile(tmp_path / "proof.jsonl") as file:
        assert file.recover() == ['{"nonce":0}']


def test_lines_that_are_used_again_never_leave_the_file(tmp_path, monkeypatch):
    """A run that died before its rename left a footer; the next wrote all lines a second time."""
    path = tmp_path / "proof.jsonl"
    lines = [dumps({"nonce": nonce}) for nonce in range(3)]
    with PartialFile(path) as file:
        file.append_lines(["{}", *lines, '{"footer":"é"}'])

    def killed(*arguments):
        raise AssertionError

    with PartialFile(path) as file:
        monkeypatch.setattr(file, "append_lines", killed)
        assert file.resume("{}", 3, lambda number, line: line.decode()) == [f"{n}\n" for n in lines]
    assert path.with_name("proof.jsonl.partial").read_text().split() == ["{}", *lines]


def test_what_is_no_partial_file_is_left_as_it_is(tmp_path):
    other = tmp_path / "proof.jsonl.partial"
    other.write_text("my notes\nand more\n")
    with PartialFile(tmp_path / "proof.jsonl") as file, pytest.raises(StorageError):
        file.recover()
    assert other.read_text() == "my notes\nand more\n"
    other.write_text('{"half')  # a line that a crash tore
    with PartialFile(tmp_path / "proof.jsonl") as file:
        assert file.recover() == []


def test_no_file_takes_the_place_of_a_pipe_or_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (
        lambda: write_atomic(pipe, "{}"),
        lambda: check_new_file(pipe, overwrite=True),
        lambda: PartialFile(pipe, overwrite=True),
    ):
        with pytest.raises(StorageError):
            write()
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_name_is_refused_before_the_work_where_its_file_could_not_grow(tmp_path):
    with refuses(StorageError, "a name is refused where its file could not grow"):
        check_new_file(tmp_path / ("a" * 248))
    check_new_file(tmp_path / ("a" * 247))
    write_atomic(tmp_path / ("a" * 247), "{}")
    assert names(tmp_path) == ["a" * 247]


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "proof.jsonl"
    code = """
        import sys
        from assay.errors import StorageError
        from assay.files.storage import PartialFile
        try:
            PartialFile(sys.argv[1])
        except StorageError:
            print("refused")
    """
    with PartialFile(path) as file:
        file.append_lines(['{"nonce":0}'])
        assert run_python(code, str(path)).stdout == "refused\n"
        with pytest.raises(StorageError):
            PartialFile(path)
        file.append_lines(['{"nonce":1}'])
    assert run_python(code, str(path)).stdout == ""


def test_an_existing_file_is_not_overwritten_unless_allowed(tmp_path):
    path = tmp_path / "proof.jsonl"
    path.write_text("old")
    with pytest.raises(UsageError):
        PartialFile(path)
    with PartialFile(path, overwrite=True) as file:
        file.append_lines(["{}"])
        assert path.read_text() == "old"
        file.commit()
    assert path.read_text() == "{}\n"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "proof.jsonl"
    with PartialFile(path) as file:
        file.append_lines(["{}"])
        path.write_text("theirs")
        with pytest.raises(UsageError):
            file.commit()
    assert path.read_text() == "theirs"
    assert path.with_name("proof.jsonl.partial").exists()


def test_whole_json_lines_are_written_in_one_step_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ({"n": n} for n in range(2)))
    with pytest.raises(UsageError):
        write_jsonl(path, [{"n": 5}, {"n": float("nan")}])
    assert path.read_bytes() == b'{"n":0}\n{"n":1}\n'


def test_a_missing_directory_and_a_directory_in_the_way(tmp_path):
    (tmp_path / "x.partial").mkdir()
    for path in (tmp_path / "none" / "x", tmp_path, tmp_path / "x"):
        with pytest.raises(StorageError) as refusal:
            PartialFile(path)
        assert refusal.value.seen.startswith(str(path))


def test_write_atomic_replaces_in_one_step_and_leaves_nothing_behind_when_it_fails(tmp_path):
    for missing in (tmp_path / "none" / "x", tmp_path):
        with pytest.raises(StorageError):
            write_atomic(missing, "text")
    assert names(tmp_path) == []
    write_atomic(tmp_path / "report.html", "old")
    write_atomic(tmp_path / "report.html", "grün")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "grün"
    assert names(tmp_path) == ["report.html"]


@pytest.mark.parametrize("write", [PartialFile, lambda path: write_atomic(path, "text")])
@pytest.mark.parametrize("name", ["n" * 300, ".", "/"])
def test_names_that_cannot_be_files_are_storage_errors(tmp_path, write, name):
    with pytest.raises(StorageError):
        write(name if name in {".", "/"} else tmp_path / name)


def test_a_directory_that_takes_files_and_shows_none_is_written_into(tmp_path, monkeypatch):
    """The file had its name, and the command ended with an error."""
    opened = os.open

    def refusing(path, flags, *mode):
        if flags == os.O_RDONLY and path == tmp_path:
            raise PermissionError(errno.EACCES, "", path)
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    write_atomic(tmp_path / "text", "text")
    with PartialFile(tmp_path / "lines") as file:
        file.append_lines(["{}"])
        file.commit()
    assert {*names(tmp_path)} == {"text", "lines"}


@pytest.mark.parametrize("home", ["missing", "without an entry", "with a cache of root"])
def test_a_user_without_a_home_has_a_cache_of_their_own(tmp_path, monkeypatch, home):
    """`make demo` ended with a RuntimeError, or with a folder that cannot be made."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(storage, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    if home == "without an entry":
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    if home == "with a cache of root":
        (tmp_path / "nobody" / ".cache").mkdir(parents=True)
        access = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, mode: access(path, mode) and (path.name, mode) != (".cache", os.W_OK),
        )
    folder = cache_folder()
    assert folder == cache_folder() == tmp_path / f"assay-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    with pytest.raises(StorageError) as refusal:
        cache_folder()
    assert "XDG_CACHE_HOME" in refusal.value.do
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StorageError):
        cache_folder()
