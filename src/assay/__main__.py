"""The entry point of the command line."""


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from assay.cli import run
    except KeyboardInterrupt:  # before any signal handler is installed
        raise SystemExit(130) from None
    raise SystemExit(run())


if __name__ == "__main__":
    main()
