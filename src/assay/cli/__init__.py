"""The command line: one app, a sub-app per instrument.

Results go to stdout, progress and logs to stderr. Every command with a result takes ``--json``.
Values come from flags, then ``ASSAY_*`` environment variables, then the configuration file, then
defaults.
"""

from assay.cli.app import app, run

__all__ = ["app", "run"]
