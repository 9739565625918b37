#!/usr/bin/env bash
# ProPy on QVHighlights val: the published settings; scripts/launch.sh says how to set others.

video_dir=${video_dir:-data/qvhighlights/videos}
train_annos=${train_annos:-annotations/qvhighlights/train.jsonl}
val_annos=${val_annos:-annotations/qvhighlights/val.jsonl}

lr=${lr:-9e-4}
max_words=${max_words:-64}
temp_kernel_sz=${temp_kernel_sz:-5}

datatype=qvhighlights_val
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
