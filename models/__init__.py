"""Whole networks: load a checkpoint into one and call it on a video or a sentence."""

from models.propy import ProPy, build_model

__all__ = ["ProPy", "build_model"]
