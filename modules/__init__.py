"""Parts that would make sense in another network, given only numbers: torch and each other only."""
