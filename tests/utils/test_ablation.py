"""Ablations: the statistics against brute force, and what tables, page and plot say of them."""

from __future__ import annotations

import csv
import io
from itertools import product
from statistics import mean, stdev

import numpy as np
import pytest

from utils import RunError
from utils.report.ablation import MOST_SEEDS, Ablation, Compared, Variant, sign_flip_test, spread

VARIANTS = [
    Variant("base", "the published one", []),
    Variant("a | <b>", "Is $x$ better?", ["--Nvp=0"]),
    Variant("not yet run", "nothing", []),
]


def brute_force(differences: list[float]) -> float:
    observed = abs(sum(differences))
    sums = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(abs(s) >= observed - 1e-9 for s in sums) / len(sums)


def test_the_sign_flip_test_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 8):
        for _ in range(10):
            d = rng.normal(0.5, 1, n).round(1).tolist()  # with ties and zeros
            p = sign_flip_test(d)
            assert p == brute_force(d)
            assert p == sign_flip_test([-x for x in d]) == sign_flip_test([8.0 * x for x in d])
            assert 2 / 2**n <= p <= 1 or n == 1


def test_known_values_of_the_sign_flip_test() -> None:
    assert sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_test([0.1] * 6) == 2 / 64, "equal sums are equal, whatever their rounding"
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([1.0, -1.0]) == 1
    assert sign_flip_test([1.0, 1.0, -1.0]) == 1
    assert 0 < sign_flip_test([1.0] * MOST_SEEDS) == 2 / 2**MOST_SEEDS
    with pytest.raises(RunError, match=f"at most {MOST_SEEDS}"):
        sign_flip_test([1.0] * (MOST_SEEDS + 1))


def test_its_p_is_the_rate_of_false_alarms() -> None:
    """Where nothing differs, p ≤ 0.1 comes out in no more than a tenth of the trials."""
    rng = np.random.default_rng(1)
    ps = np.array([sign_flip_test(rng.normal(size=7).tolist()) for _ in range(2000)])
    assert 0.07 < (ps <= 0.1).mean() < 0.115


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("own", "base", "verdict"),
    [
        (seeds(3, 4, 5), seeds(2.5, 3.5, 4.5), "="),  # in all seeds, but inside the spread
        (seeds(13, 14, 15), seeds(2, 4, 5), "higher"),  # three seeds prove nothing
        (seeds(-13, -14, -15), seeds(2, 4, 5), "lower"),
        (seeds(*range(20, 26)), seeds(*range(6)), "better"),
        (seeds(*range(6)), seeds(*range(20, 26)), "worse"),
        (seeds(*range(20, 26)), seeds(0, 0, 0, 0, 0, 60), "="),  # the base's spread counts too
        (seeds(50), seeds(1), "="),  # one seed has no spread
    ],
)
def test_nothing_is_called_better_inside_the_spread(own, base, verdict) -> None:
    assert Compared(own, base).verdict == verdict


def test_comparisons_are_of_the_seeds_that_both_have() -> None:
    compared = Compared({1: 5.0, 2: 7.0, 9: 100.0}, {2: 4.0, 1: 3.0, 3: 50.0})
    assert compared.differences == [2.0, 3.0] and compared.against.startswith(
        "+2.50 (2 of 2, p 0.5)"
    )
    assert Compared({1: 5.0}, {}).differences == [] and Compared({1: 5.0}, {}).against == "–"
    assert spread([1.0]) is None and spread([1.0, 2.0, 6.0]) == stdev([1, 2, 6])


@pytest.fixture
def ablation() -> Ablation:
    base = {1: 240.0, 2: 242.0, 3: 239.0}
    other = {1: 250.0, 2: 251.0, 3: 249.5}
    results = {
        name: {
            seed: {"SumR": v, "R1": v / 10, "gflop": 2.5, "unknown": 1} for seed, v in own.items()
        }
        for name, own in (("base", base), ("a | <b>", other))
    }
    results["a | <b>"][3]["VCMR/0.7-r10"] = 4.0
    return Ablation("a grid on <demo>", VARIANTS, results, ["A note & more."])


def test_tables_say_what_was_measured(ablation, tmp_path) -> None:
    text = ablation.markdown()
    assert (
        f"| base | 3 | {mean([240, 242, 239]):.2f} ± {stdev([240, 242, 239]):.2f} | 24.03" in text
    )
    assert (
        "| a \\| <b> | +9.83 (3 of 3, p 0.25) higher | +0.98 (3 of 3, p 0.25) higher | – |" in text
    )
    assert "| a \\| <b> | Is $x$ better? | --Nvp=0 | – | 2.5 | – | – |" in text
    assert "not yet run" not in text and "unknown" not in text and "A note & more." in text
    lines = list(csv.DictReader(io.StringIO(ablation.csv())))
    (line,) = [x for x in lines if (x["variant"], x["number"]) == ("a | <b>", "SumR")]
    assert float(line["difference"]) == pytest.approx(29.5 / 3) and float(line["p"]) == 0.25
    assert line["values"] == "1:250 2:251 3:249.5" and line["verdict"] == "higher"
    assert {x["verdict"] for x in lines if x["variant"] == "base"} == {""}
    paths = ablation.write(tmp_path)
    assert [p.name for p in paths] == ["table.md", "table.csv", "table.html", "plot.png"]
    assert (tmp_path / "table.md").read_text() == text
    page = (tmp_path / "table.html").read_text()
    assert "a | &lt;b&gt;" in page and "<b>" not in page and "+9.83 (3 of 3, p 0.25) higher" in page
    assert "http://" not in page and "https://" not in page
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_seeds_means_and_spreads(ablation) -> None:
    figure = ablation.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["SumR", "R@1", "VCMR R10@0.7"]
    axes = panels[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base", "a | <b>"]
    drawn = [sorted(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 3]
    assert drawn == [[239.0, 240.0, 242.0], [249.5, 250.0, 251.0]]
    for y, container in enumerate(axes.containers):
        (bar,) = container[2][0].get_segments()
        deviation = stdev(drawn[y])
        assert bar[:, 0] == pytest.approx([mean(drawn[y]) - deviation, mean(drawn[y]) + deviation])
    figure.draw_without_rendering()
