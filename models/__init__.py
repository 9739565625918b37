"""Whole networks: load a checkpoint into one and call it on a video or a sentence."""

from models.propy import ProPy, ProPyConfig, build_model
from models.trained import load_propy

__all__ = ["ProPy", "ProPyConfig", "build_model", "load_propy"]
