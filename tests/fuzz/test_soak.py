"""Memory and open files of a run that trains for a while: they do not grow."""

from __future__ import annotations

import time

import numpy as np
import psutil
import pytest

from tests.corpus import FLAGS, TRAIN, make_corpus
from tests.forked_main import ForkedMain

CLIPS, EPOCHS, WORKERS = 40, 10, 4
# What may be gained over the second half: the allocators' noise, far below any leak of clips.
MAX_GROWTH_MIB, MAX_GROWTH_FILES = 64.0, 4.0


@pytest.mark.slow
def test_a_long_run_does_not_grow(tmp_path) -> None:
    """Of all its processes together: memory shared between them counts once."""
    colours = np.random.RandomState(0).randint(256, size=(CLIPS, 2, 3))
    make_corpus(tmp_path / "corpus", colours, lambda clip, half: (f"{clip}#{half}", f"wall {clip}"))
    program, samples = ForkedMain(tmp_path / "corpus"), []
    root = psutil.Process(program.start(
        *FLAGS, *TRAIN, "--video_dir", "videos", "--output_dir", str(tmp_path / "run"),
        "--epochs", str(EPOCHS), "--num_thread_reader", str(WORKERS),
    ))  # fmt: skip

    def sample() -> bool:
        try:
            family = [root, *root.children(recursive=True)]
            mib = sum(process.memory_full_info().pss for process in family) / 2**20
            if len(family) > WORKERS:
                files = sum(process.num_fds() for process in family)
                samples.append((time.monotonic(), mib, files))
        except psutil.Error:  # one of them ended meanwhile
            return not root.is_running() or root.status() == psutil.STATUS_ZOMBIE
        time.sleep(0.1)
        return False

    program.wait_until(sample, seconds=500)
    assert program.wait().returncode == 0
    assert len(samples) > 50
    half = np.array(samples[len(samples) // 2 :])
    mib, files = np.polyfit(half[:, 0], half[:, 1:], 1)[0] * (half[-1, 0] - half[0, 0])
    assert mib < MAX_GROWTH_MIB and files < MAX_GROWTH_FILES, samples
