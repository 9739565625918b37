"""Fixtures every test may use: golden files, a run on a small corpus, real data if it is there."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.corpus import TinyRun, make_run
from utils.misc import set_seed

# The same examples every time, and no alarm where the machine is busy.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

# A shell that starts these in the background has SIGINT ignored, here and in all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """No test hears of those before it: each begins with the same random states, also its modules'
    fixtures, and leaves torch's switches as they were."""
    set_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)
        # A loader worker that was killed, and is a zombie still, would be held against the next.
        multiprocessing.active_children()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the fixtures computed with the authors' program (tests/golden/README.md)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> TinyRun:
    """Two epochs, evaluated and drawn (tests/corpus.py)."""
    return make_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(trained, tmp_path) -> TinyRun:
    """On its corpus, into a folder of the test's own."""
    return TinyRun(trained.corpus, tmp_path)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real annotations and videos kept beside the checkout; tests that need them skip elsewhere."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}")
    return path
