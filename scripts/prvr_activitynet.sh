#!/usr/bin/env bash
# ProPy on ActivityNet Captions: the published settings.
# Every variable and every flag of main.py can be set from outside, and flags are passed on;
# scripts/launch.sh has examples.
# The published row compares texts with events whose lengths are left in, which chose its best
# epoch too: it stands beside the cosine's, and its best epoch is ckpt.best_dot.pth.tar
# (models/README.md, "Deviations").

do_train=${do_train:-1}
do_eval=${do_eval:-0}
resume=${resume:-}

video_dir=${video_dir:-data/activitynet/videos}
train_annos=${train_annos:-annotations/activitynet/train.jsonl}
val_annos=${val_annos:-annotations/activitynet/val.jsonl}

lr=${lr:-1e-3}
max_words=${max_words:-64}
temp_kernel_sz=${temp_kernel_sz:-5}
event_scores=${event_scores:-both}

datatype=activitynet
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
