# The one launcher behind scripts/prvr_<split>.sh and scripts/vcmr_<split>.sh, which set a split's
# variables and source it. Every flag of main.py can be set from outside, as a variable of its name
# (plot_ids, a list, only as a flag) or after the script's name; what comes from outside is printed:
#   do_train=0 do_eval=1 resume=logs/prvr_tvr/ckpt.best.pth.tar bash scripts/prvr_tvr.sh
#   do_train=0 do_eval=1 zero_shot=best bash scripts/prvr_tvr.sh    # CLIP alone, without training
#   precision=bf16 bash scripts/prvr_tvr.sh --gradient_accumulation_steps 2
#   gpus=4 bash scripts/prvr_tvr.sh     # the same run on four GPUs of this machine
#   variant=plus bash scripts/prvr_tvr.sh    # the recipe past the published one, see below
# What no one sets has main.py's default, the published one. Relative paths count from the checkout,
# wherever you stand. `.venv/bin/python main.py --help` explains the flags.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh

case ${variant:=} in
  "") ;;
  plus)
    # more moments on synthetic corpora, no real videos yet: scripts/ablations/README.md
    readout=${readout:-consensus} ;;
  *) echo "launch: variant $variant: plus, or none for the published method" >&2; exit 2 ;;
esac

subtask_type=${subtask_type:-PRVR}
name=$datatype${variant:+_$variant}${zero_shot:+_zero_shot_$zero_shot}
output_dir=${output_dir:-logs/${subtask_type,,}_$name}
[ -z "$variant" ] || plot_dir=${plot_dir:-VIS/$name}
prvr_val_annos=${prvr_val_annos:-$val_annos}
prvr_train_annos=${prvr_train_annos:-$train_annos}
[ "$do_train" = 1 ] || prvr_train_annos=
[ -z "${frame_store:-}" ] || video_dir=  # a frame store takes the place of the video folder

flags=() outside=()
for name in $(grep -o 'add("--[A-Za-z_]*' utils/arguments.py | cut -c 8-); do
  [ -n "${!name:-}" ] || continue
  flags+=("--$name" "${!name}")
  if printenv "$name" >/dev/null; then outside+=("$name=${!name}"); fi
done
for name in val_annos train_annos gpus variant; do
  if printenv "$name" >/dev/null; then outside+=("$name=${!name}"); fi
done
if [ "${dry_run:-0}" = 1 ]; then printf '%s\0' "${flags[@]}" "$@"; exit; fi  # for other programs
[ "${#outside[@]}" = 0 ] || echo "launch: from the environment: ${outside[*]}" >&2
exec .venv/bin/python ${gpus:+-m torch.distributed.run --standalone --nproc_per_node "$gpus"} \
  main.py "${flags[@]}" "$@"
