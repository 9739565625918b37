#!/usr/bin/env bash
# ProPy on QVHighlights, evaluated on val: the published settings.
# Every variable and every flag of main.py can be set from outside, and flags are passed on;
# scripts/launch.sh has examples.

do_train=${do_train:-1}
do_eval=${do_eval:-0}
resume=${resume:-}

video_dir=${video_dir:-data/qvhighlights/videos}
train_annos=${train_annos:-annotations/qvhighlights/train.jsonl}
val_annos=${val_annos:-annotations/qvhighlights/val.jsonl}

lr=${lr:-9e-4}
max_words=${max_words:-64}
temp_kernel_sz=${temp_kernel_sz:-5}

datatype=qvhighlights_val
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
