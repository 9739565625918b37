#!/usr/bin/env bash
# Fetch OpenAI's CLIP weights, checked, into CLIP_weights:
#   bash scripts/download_clip.sh              ViT-B/32, which the paper uses
#   bash scripts/download_clip.sh ViT-L/14     or ViT-B/16
# A download that broke off is resumed. clip_dir=... chooses another folder;
# a relative one counts from the checkout. base_url=... chooses another server,
# which has the file under <base_url>/<sha256>/ as OpenAI's does.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

name=${1:-ViT-B/32}
folder=${clip_dir:-CLIP_weights}
# sha256 as OpenAI publishes them, inside the address
case $name in
  ViT-B/32) sha256=40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af
    size=base-patch32 ;;
  ViT-B/16) sha256=5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f
    size=base-patch16 ;;
  ViT-L/14) sha256=b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836
    size=large-patch14 ;;
  *) echo "download_clip: no model '$name'; there are ViT-B/32, ViT-B/16 and ViT-L/14" >&2; exit 2 ;;
esac
file=${name//\//-}.pt
url=${base_url:-https://openaipublic.azureedge.net/clip/models}/$sha256/$file
target=$folder/$file

elsewhere() {
  cat >&2 <<EOF
The same weights are elsewhere too:
  base_url=https://... bash scripts/download_clip.sh $name    any server with $sha256/$file
  https://huggingface.co/timm/vit_${size/-patch/_patch}_clip_224.openai    open_clip_model.safetensors, open_clip_config.json
  https://huggingface.co/openai/clip-vit-$size    model.safetensors or pytorch_model.bin, config.json
Put the two files of one of the last into a folder of their own: --pretrained_clip_name FILE
EOF
}
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
  case $code,$answer in
    0,*) ;;
    22,408 | 22,429 | 22,5??)
      echo "download_clip: the server cannot answer now (HTTP $answer); run the same command later" >&2
      exit 1 ;;
    22,*)
      echo "download_clip: $file is not to be had there (HTTP $answer)" >&2
      elsewhere
      exit 1 ;;
    5,* | 6,* | 7,* | 35,* | 60,*)
      echo "download_clip: the server cannot be reached (curl's status $code); where a proxy is" \
        "needed, set https_proxy" >&2
      elsewhere
      exit 1 ;;
    *)
      echo "download_clip: the download broke off; run the same command to resume it" >&2
      exit 1 ;;
  esac
fi
if ! matches "$target.part"; then
  rm -f "$target.part"
  echo "download_clip: what came is not the published file (sha256 differs); it was removed." >&2
  echo "Run the command again" >&2
  elsewhere
  exit 1
fi
mv "$target.part" "$target"
echo "download_clip: $target"
