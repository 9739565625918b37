#!/usr/bin/env bash
# Pictures of the run of scripts/prvr_activitynet.sh, or of resume=CKPT: see plot_run.sh.
# The authors choose its queries by scores whose events are not normalised: --event_scores dot.
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/plot_run.sh" "${resume:-logs/prvr_activitynet}" "$@"
