#!/usr/bin/env bash
# The way to a row of the paper, step by step; what is done is skipped, and what cannot be done is named.
# Killed at any time, the same command continues:
#   bash scripts/reproduce.sh check           what is missing for each of the nine rows, and what gets it
#   bash scripts/reproduce.sh tvr             TVR's two rows, PRVR and VCMR; `all` does every one
#   seeds="1 2 3" frame_store=data/charades/frames.h5 bash scripts/reproduce.sh charades --task PRVR
#   split=mine bash scripts/reproduce.sh custom    a data set of your own: nothing to compare with
# Settings are those of scripts/prvr_<split>.sh; its variables and main.py's can be set from outside.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh
# shellcheck disable=SC2086  # several seeds are several words
exec .venv/bin/python -m scripts.reproduce "$@" ${seeds:+--seeds $seeds}
