#!/usr/bin/env bash
# Run the tests, several files at once: bash scripts/test.sh [pytest arguments]. `-m slow` runs the
# slow ones, `--randomly-seed=N` each file in its order of an earlier run, `-n 0` one file after the
# other in this process, for `-s`, breakpoints and measuring.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh --dev
export PYTEST_XDIST_AUTO_NUM_WORKERS="${PYTEST_XDIST_AUTO_NUM_WORKERS:-$(nproc)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the processes share the cores
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
