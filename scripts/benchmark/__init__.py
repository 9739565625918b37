"""Stages of scripts/benchmark, and what times them."""
