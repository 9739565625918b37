#!/usr/bin/env bash
# The whole method on a corpus of its own, in minutes on a CPU; needs no data and no weights:
# render videos, train a small CLIP on single frames, train ProPy on it, evaluate, compare.
#   bash scripts/demo.sh --help     what can be changed
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.demo.run "$@"
