"""The page's fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.search.page_index import FakeIndex, Served, sample_index


@pytest.fixture(scope="session")
def sample_videos(tmp_path_factory: pytest.TempPathFactory) -> FakeIndex:
    """Their files are shared: copy the index before changing it."""
    return sample_index(tmp_path_factory.mktemp("page") / "videos")


@pytest.fixture
def index(sample_videos: FakeIndex) -> FakeIndex:
    return replace(sample_videos, known=dict(sample_videos.known), shows=dict(sample_videos.shows))


@pytest.fixture
def served(index: FakeIndex) -> Iterator[Served]:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from utils.search.server import make_app

    with Served(make_app(index)) as served:
        yield served


@pytest.fixture
def root(index: FakeIndex) -> Path:
    return Path(index.roots[0])
