#!/usr/bin/env bash
# What ProPy attends to on TVR: pictures in VIS/tvr of queries whose right video it
# ranks first. Settings are those of scripts/prvr_tvr.sh; resume=… takes another checkpoint,
# and flags are passed on to main.py: --plot_ids, --plot_limit, --plot_layer, --plot_head,
# --plot_style, --plot_format.

do_train=0
do_plot=1
resume=${resume:-logs/prvr_tvr/ckpt.best.pth.tar}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../prvr_tvr.sh"
