#!/usr/bin/env bash
# What the demo's ProPy attends to: pictures in VIS/demo of queries whose right video it ranks first.
# Settings are those in the args.json of the run, so this draws any other run as well:
#   run=logs/prvr_mine plot_dir=VIS/mine bash scripts/plot/plot_demo.sh --plot_limit 5
# Flags are passed on to main.py: --plot_ids, --plot_limit, --plot_layer, --plot_head, --plot_style,
# --plot_format.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
bash scripts/setup.sh

run=${run:-logs/demo}
if [ ! -f "$run/args.json" ]; then
  echo "error: $run/args.json: no such file: run bash scripts/demo.sh first" >&2
  exit 1
fi
# args.json as shell variables that scripts/launch.sh reads
settings=$(.venv/bin/python - "$run/args.json" <<'PYTHON'
import json, shlex, sys
names = (
    "datatype video_dir frame_store pretrained_clip_name pretrained_dir pyr_config_path Nvp "
    "adapter_channels num_adapter_layers temp_kernel_sz max_words batch_size_val lr seed "
    "event_scores trust_clip_archive allow_missing skip_check"
)
path = sys.argv[1]
try:
    with open(path, encoding="utf-8") as file:
        args = json.load(file)
    lacking = {"datatype", "prvr_val_annos", "temp_kernel_sz", "max_words", "lr"} - set(args)
except (OSError, ValueError, TypeError) as error:
    sys.exit(f"error: {path}: not the settings of a run: {error}")
if lacking or not isinstance(args, dict):
    sys.exit(f"error: {path}: not the settings of a run, it lacks {', '.join(sorted(lacking))}")
for name in names.split():
    value = args.get(name)  # of video_dir and frame_store a run has one
    print(f"{name}={shlex.quote('' if value is None else str(value))}")
print(f"val_annos={shlex.quote(str(args['prvr_val_annos']))}")
PYTHON
)
eval "$settings"

do_train=0
do_eval=0
do_plot=1
resume=${resume:-$run/ckpt.best.pth.tar}
output_dir=$run
plot_dir=${plot_dir:-VIS/demo}
source scripts/launch.sh
