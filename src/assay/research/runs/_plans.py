"""What the plans of all experiments check alike."""

from assay.errors import UsageError

__all__ = ["check_lists"]


def check_lists(plan: object, **least: int) -> None:
    """Refuse a plan whose lists are too short or name something twice.

    Args:
        plan: has a tuple under every name.
        least: name of the tuple → the least number of entries.

    Raises:
        UsageError: names the flag.
    """
    for name, count in least.items():
        values = getattr(plan, name)
        if len(values) < count or len(set(values)) < len(values):
            raise UsageError(
                f"{name} {values!r:.80}",
                wanted=f"{count} or more, each once",
                do=f"correct --{name.replace('_', '-')}",
            )
