"""The command line, run in this process, as the tests of assay itself run it."""

from tests.cli.conftest import assay  # noqa: F401
