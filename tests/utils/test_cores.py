"""The number of cores follows what a process may use."""

from __future__ import annotations

import os

from utils.misc import usable_cores


def test_cores_that_may_not_be_used_are_not_counted() -> None:
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed) <= os.cpu_count()
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
