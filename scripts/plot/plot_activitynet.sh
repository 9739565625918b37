#!/usr/bin/env bash
# What ProPy attends to on ActivityNet Captions: pictures in VIS/activitynet of queries whose right video it
# ranks first. Settings are those of scripts/prvr_activitynet.sh; resume=… takes another checkpoint,
# and flags are passed on to main.py: --plot_ids, --plot_limit, --plot_layer, --plot_head,
# --plot_style, --plot_format.
# The authors choose the queries by scores whose events are not normalised: `--event_scores dot`.

do_train=0
do_plot=1
resume=${resume:-logs/prvr_activitynet/ckpt.best.pth.tar}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../prvr_activitynet.sh"
