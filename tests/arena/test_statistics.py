"""The arena's statistics and tables on made-up lines, by hand and against a closed form."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from scoreact.arena.statistics import (
    area,
    calls_to,
    probability_better,
    probability_interval,
    summarise,
    tilted_frontier,
)
from scoreact.arena.tables import table


def test_area_under_the_curve() -> None:
    # 0..100: (0 + 0.4) / 2 * 100 = 20; 100..300: (0.4 + 0.6) / 2 * 200 = 100; 300..400 held at 0.6: 60
    assert area([0, 100, 300], [0.0, 0.4, 0.6], 400) == pytest.approx(180 / 400)
    assert area([0, 100], [0.5, 0.5], 100) == pytest.approx(0.5)
    assert area([0, 50, 50, 100], [0.0, 0.0, 1.0, 1.0], 100) == pytest.approx(0.5)


def test_calls_to_a_fraction() -> None:
    calls, shares = [0, 100, 300, 400], [0.0, 0.4, 0.8, 0.7]
    assert calls_to(calls, shares, 0.5) == pytest.approx(150)  # a quarter of the way from 0.4 to 0.8
    assert calls_to(calls, shares, 0.4) == pytest.approx(100)
    assert calls_to(calls, shares, 0.8) == pytest.approx(300)
    assert calls_to(calls, shares, 0.81) == math.inf
    assert calls_to(calls, shares, -0.5) == 0


def test_probability_that_one_rule_is_better() -> None:
    # pairs (3,2) (3,3) (3,1) (1,2) (1,3) (1,1): 2 wins, 2 ties
    assert probability_better([3, 1], [2, 3, 1]) == pytest.approx(3 / 6)
    assert probability_better([4, 5], [1, 2, 3]) == 1
    assert probability_better([1, 2, 3], [4, 5]) == 0
    assert probability_better([1, 1], [1, 1]) == 0.5
    assert probability_interval([4, 5, 6], [1, 2, 3]) == (1, 1)
    assert all(map(math.isnan, probability_interval([4], [1, 2])))
    low, high = probability_interval([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])
    swapped_low, swapped_high = probability_interval([2, 3, 4, 5, 6], [1, 2, 3, 4, 5])
    centre = probability_better([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])
    assert centre == pytest.approx((0 + 0.5 + 1.5 + 2.5 + 3.5) / 25)
    assert low < centre < high
    assert low == pytest.approx(1 - swapped_high, abs=0.05)
    assert high == pytest.approx(1 - swapped_low, abs=0.05)


def made_up(rule: str, seed: int, shares: list[float], failed: bool = False) -> dict[str, Any]:
    """A line of results whose share at 0, 100 and 200 of 400 calls is known; J* - J_ref is 2, J_ref 1."""
    named: dict[str, Any] = {"rule": rule, "problem": "p", "kl_weight": 0.5, "seed": seed, "key": f"{rule}{seed}"}
    if failed:
        return {**named, "failed": "ValueError: no"}
    curve = [
        {"iteration": k, "network_calls": 100 * k, "reward_calls": 10 * k, "seconds": 0.5 * k, "recovered": share,
         "J": 1 + 2 * share, "J_se": 0.1, "reward": 1 + 3 * share, "kl": 2 * share, "diversity": 2.0}
        for k, share in enumerate(shares)
    ]  # fmt: skip
    reference = {"objective/J_ref": 1.0, "objective/J_star": 3.0, "objective/effective_samples": 50.0}
    start = {"objective/J": 1.0, "reward/heldout": 1.0, "policy/kl": 0.0, "sample/diversity": 2.5}
    last = {k: v for k, v in curve[-1].items() if k not in ("iteration", "J_se")}
    return {
        **named, **last, "tuned": False, "stopped": None, "iterations": len(shares) - 1, "curve": curve,
        "budget": {"network_calls": 400, "reward_calls": 40}, "transfer": {"ode 10": 1 + shares[-1]},
        "yardstick": {**reference, "start": start, "transfer": {"ode 10": 1.0}},
    }  # fmt: skip


def test_the_summary_of_made_up_runs() -> None:
    lines = [
        made_up("slow", 0, [0.0, 0.2, 0.4]), made_up("slow", 1, [0.0, 0.3, 0.6]), made_up("slow", 2, [0], True),
        made_up("fast", 0, [0.0, 0.6, 0.9]), made_up("fast", 1, [0.0, 0.5, 0.7]), made_up("fast", 1, [0.0, 0.6, 0.7]),
    ]  # fmt: skip
    [place] = summarise(lines)
    fast, slow = place["rules"]
    assert (fast["rule"], fast["runs"], slow["runs"], slow["failed"]) == ("fast", 2, 2, ["ValueError: no"])
    # t of one degree of freedom is 12.7062: half width 12.7062 * 0.1 for 0.9 and 0.7
    assert fast["recovered"] == pytest.approx((0.8, 1.27062), rel=1e-5)
    assert fast["spread"] == pytest.approx(0.2 / math.sqrt(2))
    areas = [(30 + 75 + 2 * 90) / 400, (30 + 65 + 2 * 70) / 400]
    assert fast["area"][0] == pytest.approx(statistics.mean(areas))
    assert fast["calls_to"]["0.5"] == {"median": pytest.approx(250 / 3), "reached": 2}
    assert fast["calls_to"]["0.8"] == {"median": math.inf, "reached": 1}
    assert slow["calls_to"]["0.5"] == {"median": math.inf, "reached": 1}
    ahead, behind = place["pairs"]
    assert (ahead["a"], ahead["b"], ahead["better"], behind["better"]) == ("fast", "slow", 1.0, 0.0)
    # slow ends at 0.5 in the mean: fast is there at 83.3 calls; slow itself at 200 (seed 0, its end) and 166.7
    times = (200 + 500 / 3) / 2 / (250 / 3)
    assert ahead["network_calls"] == pytest.approx({"to_the_others_end": 250 / 3, "times_fewer": times})
    assert ahead["reward_calls"] == pytest.approx({"to_the_others_end": 25 / 3, "times_fewer": times})
    assert behind["network_calls"]["to_the_others_end"] == behind["reward_calls"]["to_the_others_end"] == math.inf


def test_the_optimums_frontier_from_the_references_rewards() -> None:
    """R standard normal under the reference: exp(R / beta) shifts its mean by 1 / beta, which costs 1 / (2 beta^2)."""
    count = 200_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = math.sqrt(2) * torch.erfinv(2 * grid - 1)
    found = tilted_frontier({"rewards": values.tolist(), "prompts": [""] * count}, 1.0)
    assert found[0][1] < found[-1][1]
    near = [(kl, reward) for kl, reward in found if 0.01 < kl < 1]
    assert len(near) >= 5
    for kl, reward in near:
        assert reward == pytest.approx(math.sqrt(2 * kl), rel=0.01)
    # one sample of a hundred that soon carries everything: no further than its part is trusted
    lucky = tilted_frontier({"rewards": [0.0] * 99 + [100.0], "prompts": [""] * 100}, 1.0)
    assert 0 < len(lucky) < 20
    assert max(reward for _, reward in lucky) < 100 / 20**0.5


def test_the_table_of_made_up_runs() -> None:
    lines = [made_up("slow", seed, [0.0, 0.2, 0.4 + seed / 10]) for seed in (0, 1)]
    lines += [made_up("fast", 0, [0.0, 0.6, 0.9]), made_up("fast", 1, [0, 0.6, 0.7])]
    text = table(summarise(lines))
    assert (
        "J_ref 1; J* 3, estimated from 50 effective samples. Budget of a run: 400 network calls and 40 reward" in text
    )
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    assert rows[0].startswith("| recovered | rule | J | reward | path KL | area | calls to 50 % | calls to 80 % |")
    assert rows[2].startswith("| 80.0 ± 127.1 % | fast | 2.6 ± 2.5 |")
    assert "| not reached (1 of 2) |" in rows[2]
    assert rows[3].startswith("| 45.0 ± 63.5 % | slow |")
    assert "| not reached (1 of 2) | not reached |" in rows[3]
    assert rows[4].startswith("| 0 % | (pretrained) | 1 | 1 | 0 |")
    assert "| fast | slow | 1.00 [1.00, 1.00] | 75 | " in text
    assert "| (pretrained) | 1 |" in text
    assert len({row.count("|") for row in rows[:5]}) == 1
