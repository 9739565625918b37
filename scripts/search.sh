#!/usr/bin/env bash
# Search your own videos: bash scripts/search.sh --help
# Paths count from where you stand. What it needs besides the other scripts is installed when it is
# first used (requirements-search.txt).
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
bash "$root/scripts/setup.sh" --search
PYTHONPATH=$root exec "$root/.venv/bin/python" "$root/scripts/search.py" "$@"
