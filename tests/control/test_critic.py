"""The critic: what it remembers of the reference's paths, and that paths are flattened once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_problem import Setup

from scoreact.control.transitions import Paths, flatten


def test_the_references_paths_are_remembered_where_steps_start_and_where_they_lead(generator: torch.Generator) -> None:
    setup = Setup()
    paths = setup.scored(6, generator, reference_only=True)
    acts = torch.tensor([True, False, True, False])  # steps 0 and 2 act, and lead to the states before 1 and 3
    for which, seen in ((acts, [0, 1, 2, 3]), (acts.flip(0), [1, 2, 3])):  # nobody asks the reference at the path's end
        setup.critic.remember(Paths(replace(paths.trajectory, acts=which), paths.rewards))
        sample = setup.critic.fitter.memory[-1]
        assert sample.t.tolist() == [float(setup.ts[k]) for k in seen for _ in range(6)]
        assert torch.equal(sample.target.reshape(-1, 6), paths.rewards.expand(len(seen), 6))
        assert sample.later_costs is None
        x = paths.trajectory.xs[seen].flatten(0, 1)
        expected = setup.critic.value.inputs_at(sample.t, x, sample.condition)
        torch.testing.assert_close(sample.features, expected)


def test_paths_without_an_action_are_told(generator: torch.Generator) -> None:
    setup = Setup()
    paths = setup.scored(6, generator, reference_only=True)
    still = Paths(replace(paths.trajectory, acts=torch.zeros(4, dtype=torch.bool)), paths.rewards)
    with pytest.raises(ValueError, match="no step of the path has noise"):
        setup.critic.remember(still)


def test_acting_steps_are_flattened_once(generator: torch.Generator) -> None:
    setup = Setup()
    paths = setup.scored(["a", "b", "c"], generator)
    paths = Paths(replace(paths.trajectory, acts=torch.tensor([True, False, True, True])), paths.rewards)
    t, x, condition = paths.states(paths.acting)
    assert (t.data_ptr(), x.data_ptr()) == (paths.batch.t0.data_ptr(), paths.batch.x.data_ptr())
    assert condition is paths.batch.condition
    assert list(condition.prompts) == ["a", "b", "c"] * 3
    assert torch.equal(paths.rows(paths.trajectory.noise), paths.batch.noise)
    other = flatten(paths.trajectory, paths.acting)
    for name in ("t0", "t1", "x", "noise", "mean", "std", "control"):
        assert torch.equal(getattr(other, name), getattr(paths.batch, name))
    end, last, _ = paths.states(torch.tensor([4]))
    assert bool((end == setup.ts[-1]).all())
    assert torch.equal(last, paths.trajectory.xs[-1])
