"""The command line, run in this process: exit code, stdout and stderr."""

import json
import re
from dataclasses import dataclass

import pytest

from assay.cli import run
from assay.poc import Round, prove
from tests.settings_files import with_file

KNOWN = ("--block-hash", "b", "--public-key", "k")


def made(model, nonces=range(32), **changed):
    """A proof of the block and key of :data:`KNOWN`, of sixteen positions unless another round is
    asked for.
    """
    round = Round(**({"block_hash": "b", "public_key": "k", "seq_len": 16} | changed))
    return prove(model, round, nonces, batch_size=8)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def assay(capsys, tmp_path_factory):
    """Run ``assay`` with arguments; those that are no options go into a configuration file."""

    def call(*arguments):
        code = run(with_file(*arguments, folder=tmp_path_factory.getbasetemp()))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def proving(small_checkpoint, tmp_path):
    """Words that prove 24 nonces of the small checkpoint into a file; keyword arguments change
    flags.
    """

    def words(name="proof.jsonl", *extra, **flags):
        options = {
            "model": small_checkpoint,
            "block_hash": "b",
            "public_key": "k",
            "nonces": "0:24",
            "seq_len": 16,
        }
        options |= {"batch_size": 8, "device": "cpu"} | flags
        given = [
            item
            for flag, value in options.items()
            for item in (f"--{flag.replace('_', '-')}", value)
        ]
        return "poc", "prove", *given, "-o", tmp_path / name, *extra

    return words


@pytest.fixture
def verify(assay, small_checkpoint, tmp_path):
    """Verify a proof with flags, as JSON."""

    def call(proof, *flags, model=small_checkpoint):
        path = tmp_path / "proof.jsonl"
        proof.save(path, overwrite=True)
        return assay("poc", "verify", path, "--model", model, "--device", "cpu", "--json", *flags)

    return call


@pytest.fixture
def told(assay):
    """Run a command that succeeds; give what it says as JSON."""

    def call(*arguments):
        done = assay(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return call


@pytest.fixture
def refused(assay):
    """Run a command that cannot work: code 2, an error in three parts, and no traceback; give
    stderr.
    """

    def call(*arguments):
        found = assay(*arguments)
        assert (found.code, found.out) == (2, ""), found.err
        assert re.search(r"error: .+\n  wanted: .+\n  to do:  .+", found.err, flags=re.DOTALL), (
            found.err
        )
        assert "Traceback" not in found.err
        return found.err

    return call
