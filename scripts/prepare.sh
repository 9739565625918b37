#!/usr/bin/env bash
# Videos as downloaded -> 3 fps clips that the programs read, one <vid_name>.mp4 each.
# The variables may be set from outside; further arguments go to scripts/prepare_videos.py (--help):
#   INPUT=~/Charades_v1 VIDEO_DIR=videos/charades bash scripts/prepare.sh --workers 8
set -euo pipefail
cd "$(dirname "$0")/.."

INPUT=${INPUT:?set INPUT to the folder of the downloaded videos or frame folders}
VIDEO_DIR=${VIDEO_DIR:-videos}     # where the clips go
ANNOTATIONS=${ANNOTATIONS:-}       # an annotation file: report which of its videos are missing

bash scripts/setup.sh
exec .venv/bin/python scripts/prepare_videos.py --inputs "$INPUT" --output_dir "$VIDEO_DIR" \
  ${ANNOTATIONS:+--annotations "$ANNOTATIONS"} "$@"
