"""Parts that would make sense in another network: torch and each other only."""
