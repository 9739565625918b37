#!/usr/bin/env bash
# ProPy on TVR: the published settings; scripts/launch.sh says how to set others.

video_dir=${video_dir:-data/tvr/videos}
train_annos=${train_annos:-annotations/tvr/train.jsonl}
val_annos=${val_annos:-annotations/tvr/val.jsonl}

lr=${lr:-8e-4}
max_words=${max_words:-32}
temp_kernel_sz=${temp_kernel_sz:-5}

datatype=tvr
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
