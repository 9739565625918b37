#!/usr/bin/env bash
# ProPy on ActivityNet Captions: the published settings.
# Every variable and every flag of main.py can be set from outside, and flags are passed on;
# scripts/launch.sh has examples.
# The published row compares texts with events whose lengths are left in: add
# `--event_scores both` for it beside the cosine (README, "Deviations").

do_train=${do_train:-1}
do_eval=${do_eval:-0}
resume=${resume:-}

video_dir=${video_dir:-data/activitynet/videos}
train_annos=${train_annos:-annotations/activitynet/train.jsonl}
val_annos=${val_annos:-annotations/activitynet/val.jsonl}

lr=${lr:-1e-3}
max_words=${max_words:-64}
temp_kernel_sz=${temp_kernel_sz:-5}

datatype=activitynet
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
