"""Parts that would make sense in another network: torch and each other only."""


class ModelError(ValueError):
    """Weights, a pyramid or a configuration that make no model; names the file and the key."""
