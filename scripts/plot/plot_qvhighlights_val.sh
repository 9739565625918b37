#!/usr/bin/env bash
# What ProPy attends to on QVHighlights, val: pictures in VIS/qvhighlights_val of queries whose right video it
# ranks first. Settings are those of scripts/prvr_qvhighlights_val.sh; resume=… takes another checkpoint,
# and flags are passed on to main.py: --plot_ids, --plot_limit, --plot_layer, --plot_head,
# --plot_style, --plot_format.

do_train=0
do_plot=1
resume=${resume:-logs/prvr_qvhighlights_val/ckpt.best.pth.tar}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../prvr_qvhighlights_val.sh"
