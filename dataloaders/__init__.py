"""From an annotation line or a video file to a batch on the CPU; knows no model."""


class DataError(Exception):
    """Annotations, clips or containers that cannot be used; names the file (and line), what is
    wrong and the remedy."""
