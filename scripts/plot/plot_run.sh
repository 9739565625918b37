#!/usr/bin/env bash
# What the ProPy of a run attends to: pictures of queries whose right video it ranks first.
#   bash scripts/plot/plot_run.sh logs/prvr_tvr --plot_limit 5     # its best epoch; or a checkpoint
#   plot_dir=VIS/mine bash scripts/plot/plot_run.sh logs/prvr_mine
# Settings are those in the checkpoint, pictures go to the run's plot_dir (VIS/<split>). Flags are passed
# on to main.py: --plot_ids, --plot_limit, --plot_layer, --plot_head, --plot_style, --plot_format.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.plot.plot_run "$@"
