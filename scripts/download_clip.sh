#!/usr/bin/env bash
# Fetch OpenAI's CLIP weights, checked, into CLIP_weights:
#   bash scripts/download_clip.sh              ViT-B/32, which the paper uses
#   bash scripts/download_clip.sh ViT-L/14     or ViT-B/16
# A download that broke off is resumed. clip_dir=... chooses another folder;
# a relative one counts from the checkout.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

name=${1:-ViT-B/32}
folder=${clip_dir:-CLIP_weights}
# sha256 as OpenAI publishes them, inside the address
case $name in
  ViT-B/32) sha256=40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af ;;
  ViT-B/16) sha256=5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f ;;
  ViT-L/14) sha256=b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836 ;;
  *) echo "download_clip: no model '$name'; there are ViT-B/32, ViT-B/16 and ViT-L/14" >&2; exit 2 ;;
esac
file=${name//\//-}.pt
url=${base_url:-https://openaipublic.azureedge.net/clip/models}/$sha256/$file
target=$folder/$file

matches() { echo "$sha256  $1" | sha256sum --check --status 2>/dev/null; }

mkdir -p "$folder"
if [ -f "$target" ]; then
  matches "$target" && { echo "download_clip: $target is there and is right"; exit 0; }
  echo "download_clip: $target is not the published file (sha256 differs); move it away first" >&2
  exit 1
fi
command -v curl >/dev/null || { echo "download_clip: needs curl; install it" >&2; exit 1; }
echo "download_clip: $url" >&2
fetch() {
  answer=$(curl --fail --location --continue-at - --progress-bar --write-out '%{http_code}' \
    --output "$target.part" "$url")
}
# a complete .part may be left where the last run was stopped before its check
if ! matches "$target.part"; then
  fetch && code=0 || code=$?
  # nothing follows what is there (status 416), or it cannot be gone on with (curl's 33 and 36)
  if [ -s "$target.part" ] && [[ $code = 3[36] || $answer = 416 ]]; then
    echo "download_clip: $target.part cannot be resumed; starting from zero" >&2
    rm -f "$target.part"
    fetch && code=0 || code=$?
  fi
  if [ "$code" != 0 ]; then
    echo "download_clip: the download broke off; run the same command to resume it" >&2
    exit 1
  fi
fi
if ! matches "$target.part"; then
  rm -f "$target.part"
  echo "download_clip: what came is not the published file (sha256 differs); it was removed." >&2
  echo "Run the command again" >&2
  exit 1
fi
mv "$target.part" "$target"
echo "download_clip: $target"
