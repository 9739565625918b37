#!/usr/bin/env bash
# Fetch CLIP weights, checked, into CLIP_weights:
#   bash scripts/download_clip.sh              ViT-B/32, which the paper uses
#   bash scripts/download_clip.sh ViT-L/14     or ViT-B/16, ViT-L/14@336px: OpenAI's archives
#   bash scripts/download_clip.sh ViT-B-32/laion2b_s34b_b79k    open_clip's name: from the hub
#   bash scripts/download_clip.sh --list       all names
# A download that broke off is resumed. clip_dir=... chooses another folder;
# a relative one counts from the checkout. base_url=... chooses another server,
# which has OpenAI's file under <base_url>/<sha256>/; HF_ENDPOINT=... another hub.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

name=${1:-ViT-B/32}
folder=${clip_dir:-CLIP_weights}
size=
# sha256 as OpenAI publishes them, inside the address
case $name in
  ViT-B/32) sha256=40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af
    size=base-patch32 ;;
  ViT-B/16) sha256=5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f
    size=base-patch16 ;;
  ViT-L/14) sha256=b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836
    size=large-patch14 ;;
  ViT-L/14@336px) sha256=3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02
    size=large-patch14-336 ;;
  *)  # open_clip's table and the hub say what and where it is
    bash scripts/setup.sh
    [ "$name" != --list ] || exec .venv/bin/python -m scripts.download_clip --list
    published=$(.venv/bin/python -m scripts.download_clip "$name" --folder "$folder")
    read -r sha256 url file <<<"$published" ;;
esac
if [ -n "$size" ]; then
  file=${name//[\/@]/-}.pt
  architecture=${file%.pt}
  architecture=${architecture%px}
  url=${base_url:-https://openaipublic.azureedge.net/clip/models}/$sha256/$file
fi
target=$folder/$file

elsewhere() {
  if [ -z "$size" ]; then
    echo "HF_ENDPOINT=https://... names another hub" >&2
    return
  fi
  cat >&2 <<EOF
The same weights are elsewhere too:
  base_url=https://... bash scripts/download_clip.sh $name    any server with $sha256/$file
  bash scripts/download_clip.sh $architecture-quickgelu/openai    from the hub, under that name
  https://huggingface.co/openai/clip-vit-$size    model.safetensors or pytorch_model.bin, config.json
Put the two files of the last into a folder of their own: --pretrained_clip_name FILE
EOF
}
matches() { echo "$sha256  $1" | sha256sum --check --status 2>/dev/null; }

mkdir -p "$(dirname "$target")"
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
