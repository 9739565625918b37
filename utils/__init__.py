"""The run, not the network: training, evaluation, checkpoints, logs, pictures."""


class RunError(Exception):
    """A run that cannot start or continue: settings, checkpoints, predictions, logs, training.

    The message names the file or step, what is wrong and the remedy.
    """


class OutputError(OSError):
    """Something that cannot be written; names it, the reason and the remedy."""


class SearchError(Exception):
    """An index that cannot be opened, made or searched; names it, what is wrong and the remedy."""
