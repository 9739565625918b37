"""The number of cores follows what a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

from utils.misc import usable_cores

PROGRAM = """
import os
from utils.misc import usable_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(usable_cores())
"""


def test_cores_that_may_not_be_used_are_not_counted() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    assert 1 <= usable_cores() <= os.cpu_count()
