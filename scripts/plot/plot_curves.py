#!/usr/bin/env python3
"""Loss, learning rate and every metric by epoch, of one or several runs over each other.

.venv/bin/python -m scripts.plot.plot_curves logs/prvr_tvr logs/prvr_mine --output ab.pdf
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from utils.command import Parser, run_command
from utils.files import atomic_write, writing
from utils.pictures.draw import caption_fonts
from utils.report.curves import draw_curves
from utils.report.run_log import datatype, read_args, read_epochs, read_zero_shot, to_beat


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="LOGDIR", help="folders of runs")
    add("--output", type=Path,
        help="picture: .png, .svg or .pdf (default <first LOGDIR>/curves.png)")  # fmt: skip
    args = parser.parse_args(argv)
    output = args.output or args.folders[0] / "curves.png"
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {output}: its ending is to be .png, .svg or .pdf")
    logging.basicConfig(format="%(message)s")
    runs = {str(folder): read_epochs(folder) for folder in args.folders}
    datatypes = {datatype(read_args(folder)) for folder in args.folders}
    # Drawn if it is the same for all, as it is of runs on one split.
    zero_shot = [to_beat(read_zero_shot(folder)) for folder in args.folders]
    level = zero_shot[0] if all(values == zero_shot[0] for values in zero_shot) else {}
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as part, caption_fonts("".join(runs)):
        figure = draw_curves(runs, datatypes, level)
        figure.savefig(part, dpi=130, format=output.suffix[1:].lower())
    print(output)


if __name__ == "__main__":
    run_command(main)
