#!/usr/bin/env bash
# ProPy on TVR: the published settings.
# Every variable and every flag of main.py can be set from outside, and flags are passed on;
# scripts/launch.sh has examples.

do_train=${do_train:-1}
do_eval=${do_eval:-0}
resume=${resume:-}

video_dir=${video_dir:-data/tvr/videos}
train_annos=${train_annos:-annotations/tvr/train.jsonl}
val_annos=${val_annos:-annotations/tvr/val.jsonl}

lr=${lr:-8e-4}
max_words=${max_words:-32}
temp_kernel_sz=${temp_kernel_sz:-5}

datatype=tvr
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
