#!/usr/bin/env bash
# Run the tests, several files at once: bash scripts/test.sh [pytest arguments]. `-m slow` runs the
# slow ones, `--randomly-seed=N` those of an earlier run in its order, `-n 0` one file after the
# other in this process, as `--pdb` needs it.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh --dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the processes share the cores
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
