# The one launcher behind scripts/prvr_<split>.sh and scripts/vcmr_<split>.sh, which set a split's
# variables and source it. Every variable can be set from outside, and so can every flag of main.py,
# as a variable of its name (plot_ids, a list, only as a flag) or behind the script's name:
#   do_train=0 do_eval=1 resume=logs/prvr_tvr/ckpt.best.pth.tar bash scripts/prvr_tvr.sh
#   precision=bf16 bash scripts/prvr_tvr.sh --gradient_accumulation_steps 2
# Relative paths count from the checkout, wherever you stand. `.venv/bin/python main.py --help`
# explains the flags.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh

subtask_type=${subtask_type:-PRVR}
output_dir=${output_dir:-logs/${subtask_type,,}_$datatype}

pretrained_clip_name=${pretrained_clip_name:-ViT-B/32}
pretrained_dir=${pretrained_dir:-CLIP_weights}
pyr_config_path=${pyr_config_path:-scripts/pyramids/cfg_32.json}
Nvp=${Nvp:-4}
adapter_channels=${adapter_channels:-384}
num_adapter_layers=${num_adapter_layers:-12}

epochs=${epochs:-10}
batch_size=${batch_size:-24}
batch_size_val=${batch_size_val:-16}
seed=${seed:-42}

npev=${npev:-10}
max_event_per_text=${max_event_per_text:-1000}

flags=(
  --do_train "$do_train" --do_eval "$do_eval" --do_plot "${do_plot:-0}"
  --subtask_type "$subtask_type" --datatype "$datatype"
  --prvr_val_annos "$val_annos" --output_dir "$output_dir"
  --pretrained_clip_name "$pretrained_clip_name" --pretrained_dir "$pretrained_dir"
  --pyr_config_path "$pyr_config_path" --Nvp "$Nvp"
  --adapter_channels "$adapter_channels" --num_adapter_layers "$num_adapter_layers"
  --temp_kernel_sz "$temp_kernel_sz" --max_words "$max_words"
  --epochs "$epochs" --batch_size "$batch_size" --batch_size_val "$batch_size_val"
  --lr "$lr" --seed "$seed"
  --npev "$npev" --max_event_per_text "$max_event_per_text"
)
# A frame store (scripts/data/pack_frames.py) takes the place of the video folder.
if [ -n "${frame_store:-}" ]; then
  flags+=(--frame_store "$frame_store")
else
  flags+=(--video_dir "$video_dir")
fi
[ "$do_train" = 0 ] || flags+=(--prvr_train_annos "$train_annos")
[ -z "$resume" ] || flags+=(--resume "$resume")
# the other flags, where they are set
for name in prvr_train_annos prvr_val_annos skip_check allow_missing num_thread_reader \
  load_from_pretrained trust_clip_archive freeze_clip coef_lr wd warmup_proportion clip_grad_norm \
  gradient_accumulation_steps checkpoint_activations compile precision profile n_display \
  save_every_steps event_scores window_rule eval_memory_gib save_embeddings load_embeddings \
  save_predictions plot_dir plot_limit plot_layer plot_head plot_style plot_format; do
  [ -z "${!name:-}" ] || flags+=("--$name" "${!name}")
done
exec .venv/bin/python main.py "${flags[@]}" "$@"
