#!/usr/bin/env bash
# Variants of ProPy over seeds against a base, in one resumable command: README.md, "Ablations".
#   bash scripts/ablate.sh demo scripts/ablations/visibility.json
#   seeds="1 2 3 4 5" gpus=2 bash scripts/ablate.sh tvr scripts/ablations/readout.json --epochs 5
# Flags of main.py after the grid are for all runs.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh
# shellcheck disable=SC2086  # seeds is a list
exec .venv/bin/python -m scripts.ablate "$@" ${seeds:+--seeds $seeds} ${gpus:+--gpus "$gpus"}
