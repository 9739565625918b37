#!/usr/bin/env bash
# Pictures of the demo's run, or of run=FOLDER: see plot_run.sh.
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/plot_run.sh" "${resume:-${run:-logs/demo}}" "$@"
