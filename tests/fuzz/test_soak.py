"""Memory and open files of a run that trains for a while: they do not grow."""

from __future__ import annotations

import time

import numpy as np
import psutil
import pytest

from tests.corpus import FLAGS, TRAIN, make_corpus
from tests.forked_main import ForkedMain

CLIPS, EPOCHS, WORKERS = 40, 40, 4
# What the last quarter may gain: the allocators' noise, below a leak of the frames that it reads.
MAX_GROWTH_MIB, MAX_GROWTH_FILES = 16, 4


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
    third, last = (np.median(quarter, axis=0) for quarter in np.array_split(samples, 4)[2:])
    _, mib, files = last - third
    print(f"{len(samples)} samples; the last quarter gained {mib:+.1f} MiB, {files:+.0f} files")
    assert mib < MAX_GROWTH_MIB and files < MAX_GROWTH_FILES, (mib, files)
