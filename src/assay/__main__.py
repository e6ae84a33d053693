"""The entry point of the command line."""

import gc
import traceback
from contextlib import suppress

from assay.memory import keep_freed_memory


def main() -> None:
    """Run the command line and exit with its code; a fault of assay itself is 2, as 1 is fraud."""
    keep_freed_memory()
    code = 2
    try:
        from assay.cli.app import run

        code = run()
    except KeyboardInterrupt:  # before any signal handler is installed
        code = 130
    # A panic of a library in Rust is no Exception, and some libraries exit by themselves.
    except BaseException:
        with suppress(Exception):
            traceback.print_exc()
    # Otherwise the end of Python walks all of torch and transformers, for about a second of CPU.
    gc.freeze()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
