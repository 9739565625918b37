#!/usr/bin/env python3
"""Where a hub publishes the weights of an open_clip model; scripts/download_clip.sh fetches them.

It prints sha256, address and name of the file, or with --list the names of all models; with
--folder it writes open_clip's configuration to where the weights will be, so that a file says what
it is also under its path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from models.backbones import CONFIG_FILE, HUB_FILES, Backbone, find_backbone, list_backbones
from models.clip_weights import WEIGHTS_FILES
from modules import ModelError
from utils.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help="as architecture/tag")
    parser.add_argument("--list", action="store_true", help="print what can be the backbone")
    parser.add_argument("--folder", type=Path, help="of all weights")
    args = parser.parse_args(argv)
    if args.list == bool(args.name):
        parser.error("give a NAME or --list")
    if args.list:
        for name in WEIGHTS_FILES:
            print(f"{name:48}       OpenAI's archive")
        for found in list_backbones():
            print(f"{found.name:48} {found.sizes.input_resolution:3} px {found.repository}")
        return
    backbone = find_backbone(args.name)
    published = published_file(backbone)
    if args.folder:
        folder = args.folder / backbone.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(backbone.config, indent=1) + "\n")
    print(*published)


def published_file(backbone: Backbone) -> tuple[str, str, str]:
    """sha256, address and name in the weights folder of what the hub publishes now.

    ModelError: the hub does not answer, or has no such file or no sha256 of it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    endpoint = os.environ.get("HF_ENDPOINT") or None  # the library reads it when it is imported
    for file in HUB_FILES:
        url = hf_hub_url(backbone.repository, file, endpoint=endpoint)
        try:
            sha256 = get_hf_file_metadata(url).etag or ""
        except EntryNotFoundError:
            continue
        except (HTTPError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{url}: {reason}. HF_ENDPOINT=https://… names another hub, https_proxy a proxy"
            ) from error
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ModelError(f"{url}: no sha256 is published, so it could not be checked")
        return sha256, url, f"{backbone.name}/{file}"
    raise ModelError(f"{backbone.repository} has none of {', '.join(HUB_FILES)}")


if __name__ == "__main__":
    run_command(main)
