#!/usr/bin/env bash
# ProPy on a data set of your own: annotations as in annotations/README.md, videos prepared by
# scripts/prepare.sh. Name the split, which is its folder in annotations/, data/ and logs/, or set
# the variables one by one; scripts/launch.sh has examples:
#   split=mine bash scripts/prvr_custom.sh
#   split=mine subtask_type=VCMR bash scripts/prvr_custom.sh      # moments, if there are times

split=${split:-custom}
do_train=${do_train:-1}
do_eval=${do_eval:-0}
resume=${resume:-}

video_dir=${video_dir:-data/$split/videos}
train_annos=${train_annos:-annotations/$split/train.jsonl}
val_annos=${val_annos:-annotations/$split/val.jsonl}

lr=${lr:-8e-4}
max_words=${max_words:-32}
temp_kernel_sz=${temp_kernel_sz:-5}

datatype=custom
subtask_type=${subtask_type:-PRVR}
name=$split${variant:+_$variant}${zero_shot:+_zero_shot_$zero_shot}
output_dir=${output_dir:-logs/${subtask_type,,}_$name}
plot_dir=${plot_dir:-VIS/$name}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
