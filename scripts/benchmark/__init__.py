"""Stages of scripts/benchmark.py, and what times them."""
