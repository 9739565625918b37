#!/usr/bin/env bash
# Pictures of the run of scripts/prvr_charades.sh, or of resume=CKPT: see plot_run.sh.
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/plot_run.sh" "${resume:-logs/prvr_charades}" "$@"
