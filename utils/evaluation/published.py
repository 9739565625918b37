"""What the paper and its data sets state: results to compare with, sizes to expect.

Results in %, from the paper's tables; the column its PRVR table heads R@50 is R@10.
"""

from __future__ import annotations

PRVR_RESULTS = {
    "tvr": {"R1": 22.4, "R5": 45.0, "R10": 55.9, "R100": 89.5, "SumR": 212.8},
    "activitynet": {"R1": 14.9, "R5": 34.9, "R10": 47.5, "R100": 82.7, "SumR": 180.0},
    "charades": {"R1": 2.6, "R5": 8.7, "R10": 14.8, "R100": 50.4, "SumR": 76.5},
    "qvhighlights_val": {"R1": 37.4, "R5": 65.6, "R10": 76.1, "R100": 96.5, "SumR": 275.5},
    "qvhighlights_test": {"R1": 35.0, "R5": 63.2, "R10": 73.1, "R100": 96.2, "SumR": 267.5},
}

VCMR_KEYS = ("0.3-r10", "0.3-r100", "0.5-r10", "0.5-r100", "0.7-r10", "0.7-r100")
VCMR_ROWS = {
    "tvr": (26.26, 50.26, 17.49, 35.61, 9.65, 19.82),
    "activitynet": (28.57, 57.42, 20.81, 46.22, 12.94, 31.85),
    "charades": (6.8, 23.39, 4.73, 18.44, 2.26, 9.01),
    "qvhighlights_val": (54.32, 79.35, 45.42, 72.52, 27.94, 48.52),
}
VCMR_RESULTS = {name: dict(zip(VCMR_KEYS, row, strict=True)) for name, row in VCMR_ROWS.items()}

# CLIP ViT-L/14 without training, best frame: MSC-PRVR (NeurIPS 2025), table 5.
ZERO_SHOT_NAME = "CLIP ViT-L/14, best frame (MSC-PRVR)"
ZERO_SHOT_RESULTS = {
    "tvr": {"R1": 16.2, "R5": 33.5, "R10": 41.8, "R100": 75.7},
    "activitynet": {"R1": 15.1, "R5": 33.9, "R10": 45.1, "R100": 78.9},
    "charades": {"R1": 2.0, "R5": 8.1, "R10": 13.6, "R100": 49.4},
}

# (videos, queries) of the standard splits
SPLIT_SIZES = {
    "tvr": {"train": (17435, 87175), "val": (2179, 10895)},
    "activitynet": {"train": (10009, 37421), "val": (4917, 17505)},
    "charades": {"train": (5338, 12408), "val": (1334, 3720)},
    "qvhighlights_val": {"train": (7100, 7218), "val": (1519, 1550)},
    "qvhighlights_test": {"train": (7100, 7218), "val": (1529, 1542)},
}

DATATYPES = (*PRVR_RESULTS, "custom")

# Of a query with several windows a prediction must reach half, rounded down but at least one, as in
# the published QVHighlights results (although disjoint windows cannot both be reached), or any.
WINDOW_RULES = ("half", "any")


def split_size_warning(datatype: str, split: str, videos: int, queries: int) -> str | None:
    """A sentence with both counts if "train" or "val" is not the standard split, else None."""
    expected = SPLIT_SIZES.get(datatype, {}).get(split, (videos, queries))
    if expected == (videos, queries):
        return None
    return (
        f"not the standard {datatype} {split} split: {videos:,} videos and {queries:,} queries, "
        f"expected {expected[0]:,} and {expected[1]:,}; results will not compare with the paper's"
    )
