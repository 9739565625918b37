#!/usr/bin/env bash
# Videos as downloaded -> 3 fps clips that the programs read, one <vid_name>.mp4 each.
# The variables may be set from outside; further arguments go to scripts/data/prepare_videos.py (--help):
#   input_dir=~/Charades_v1 video_dir=data/charades/videos bash scripts/prepare.sh --workers 8
# Relative paths count from the checkout, wherever you stand. Clips that are there are kept, damaged
# ones are made again.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

input_dir=${input_dir:-}        # the downloaded videos, or folders of frames
video_dir=${video_dir:-}        # where the clips go
# annotation files, separated by spaces: report which of their videos are missing. Files with spaces
# in their names are given as flags instead: bash scripts/prepare.sh --annotations "my train.jsonl"
annotations=${annotations:-}

if [ -z "$input_dir" ] || [ -z "$video_dir" ]; then
  echo "prepare: set input_dir and video_dir, for example" >&2
  echo "    input_dir=~/Charades_v1 video_dir=data/charades/videos bash scripts/prepare.sh" >&2
  exit 2
fi
bash scripts/setup.sh
# shellcheck disable=SC2086  # several annotation files are several words
exec .venv/bin/python -m scripts.data.prepare_videos --inputs "$input_dir" --output_dir "$video_dir" \
  ${annotations:+--annotations $annotations} "$@"
