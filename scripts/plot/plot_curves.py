#!/usr/bin/env python3
"""Loss, learning rate and every metric by epoch, of one or several runs over each other.

.venv/bin/python -m scripts.plot.plot_curves logs/prvr_tvr
.venv/bin/python -m scripts.plot.plot_curves logs/a logs/b --select loss 'VCMR/0.5*' --output ab.pdf
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from utils import RunError
from utils.command import Parser, run_command
from utils.files import atomic_write, writing
from utils.report.curves import choose_names, draw_curves, published_values
from utils.report.run_log import curve_names, datatype, read_args, read_epochs


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    depth = next(
        (d for d in range(1, 20) if len({p.parts[-d:] for p in paths}) == len(set(paths))), 20
    )
    return ["/".join(path.parts[-depth:]) for path in paths]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("folders", nargs="+", type=Path, metavar="LOGDIR", help="folders of runs")
    add("--output", type=Path,
        help="picture: .png, .svg or .pdf (default <first LOGDIR>/curves.png)")
    add("--select", nargs="+", default=[], metavar="PATTERN",
        help="numbers to draw, such as loss SumR 'VCMR/0.5*' (default: all but breakdowns by "
        "query type, level and baseline)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.output and args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {args.output}: its ending is to be .png, .svg or .pdf")
    logging.basicConfig(format="%(message)s")
    runs = {
        name: read_epochs(folder)
        for name, folder in zip(run_names(args.folders), args.folders, strict=True)
    }
    found = list(dict.fromkeys(name for epochs in runs.values() for name in curve_names(epochs)))
    names = choose_names(found, args.select)
    if not names:
        raise RunError(f"nothing fits {' '.join(args.select)}; there is: {', '.join(found)}")
    datatypes = {datatype(read_args(folder)) for folder in args.folders}
    figure = draw_curves(runs, names, published_values(datatypes))
    output = args.output or args.folders[0] / "curves.png"
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as part:
        figure.savefig(part, dpi=130, format=output.suffix[1:].lower())
    print(output)


if __name__ == "__main__":
    run_command(main)
