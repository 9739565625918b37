#!/usr/bin/env bash
# Run the tests: bash scripts/test.sh [pytest arguments]. `-m slow` runs the slow ones,
# `--randomly-seed=N` those of an earlier run in its order.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh --dev
exec .venv/bin/python -m pytest "$@"
