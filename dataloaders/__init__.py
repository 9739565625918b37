"""From an annotation line or a video file to a batch on the CPU; knows no model."""

from collections.abc import Sequence


class DataError(Exception):
    """Annotations, clips or containers that cannot be used; names the file (and line), what is
    wrong and the remedy."""


def listed(lines: Sequence[str], most: int = 20) -> str:
    """The first of the lines, for a message, and how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])
