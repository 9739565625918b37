"""Recompute the metrics of predicted moments, without a model.

.venv/bin/python -m scripts.score_predictions --predictions … --annotations …
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataloaders.annotations import read_annotations
from utils import RunError
from utils.command import Parser, run_command
from utils.evaluation.moment_metrics import WINDOW_RULES
from utils.evaluation.moment_tables import moment_report, moment_tables, times_missing
from utils.evaluation.predictions import export_all, load_predictions
from utils.missing_videos import missing_counts, reduced_size


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: metrics and exports of a predictions file."""
    # fmt: off
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--predictions", type=Path, required=True, metavar="HDF5",
        help="what main.py --subtask_type VCMR --save_predictions 1 wrote")
    add("--annotations", type=Path, required=True, metavar="JSONL",
        help="the annotations that it predicted for")
    add("--allow_missing", action="store_true",
        help="skip annotated videos that are not in the predictions, and their queries, as "
        "main.py --allow_missing 1 did when it made them; the reduced size is printed")
    add("--window_rule", choices=WINDOW_RULES, default="half",
        help="of a query with several windows a prediction must reach half, rounded down but at "
        "least one (the published rule), or any; the other rule is shown beside (default half)")
    add("--export", type=Path, metavar="FOLDER",
        help="also write TVR's and QVHighlights' submission formats into this folder")
    # fmt: on
    args = parser.parse_args(argv)
    predictions = load_predictions(args.predictions)
    annotated = read_annotations(args.annotations)
    corpus = set(predictions.vid_names)
    remaining = [query for query in annotated if query.vid_name in corpus]
    queries = remaining if args.allow_missing else annotated
    try:
        predictions = predictions.align(queries)
    except RunError as error:
        hint = ", or go without what the predictions lack: --allow_missing" * (queries != remaining)
        raise RunError(f"{args.predictions}, {args.annotations}: {error}{hint}") from None
    if size := reduced_size(missing_counts("val", annotated, queries)):
        print(f"{size}\n")
    if untimed := times_missing(queries):
        print(f"{args.annotations}: {untimed}\n")
    print("\n\n".join(moment_tables(moment_report(predictions, queries, args.window_rule))))
    if args.export:
        for path in export_all(args.export, predictions, queries):
            print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
