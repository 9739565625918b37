"""Results as text tables, for the terminal and for log.txt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRVR_COLUMNS = {
    "R1": "R@1", "R5": "R@5", "R10": "R@10", "R100": "R@100", "SumR": "SumR",
    "MedR": "MedR", "MeanR": "MeanR",
}  # fmt: skip


def metrics_table(
    rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str] | Sequence[str]
) -> str:
    """Right-aligned columns under their heads, which are the keys of the numbers unless `columns`
    says others; a number that a row lacks is a dash."""
    heads = columns if isinstance(columns, Mapping) else {key: key for key in columns}
    first = max(len(name) for name in rows)
    widths = {key: max(len(head), 6) for key, head in heads.items()}
    lines = [" " * first + "".join(f"  {head:>{widths[key]}}" for key, head in heads.items())]
    for name, numbers in rows.items():
        cells = (f"  {cell(numbers.get(key)):>{widths[key]}}" for key in heads)
        lines.append(f"{name:<{first}}" + "".join(cells))
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """A number as it stands in tables, of text and of the report page."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
