"""A sample with a seed of its own is the same whatever it is drawn with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scoreact.dynamics.grids import uniform
from scoreact.dynamics.samplers import BY_SAMPLE, SAMPLERS, Sampler, by_steps, normal_as
from scoreact.dynamics.sde import SDE
from scoreact.dynamics.solvers import ddim
from scoreact.recipes.gaussian import mixture
from scoreact.sampling.draw import draw, prior_of, seeded, seeds_of
from scoreact.support.errors import SettingError
from scoreact.types import ScoreFn


def mine(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """A user's, which takes a generator and no list of them."""
    noise = torch.randn(x.shape, generator=generator)
    return torch.stack([x, *[x + noise + x.mean(0)] * (len(ts) - 1)])


@pytest.mark.parametrize("name", [*SAMPLERS, "mine"])
def test_a_sample_depends_on_its_seed_alone(name: str) -> None:
    sampler: Sampler = mine if name == "mine" else SAMPLERS[name]
    model = mixture(2, 3, 0)
    ts = uniform(model.schedule, 4)
    xs, samples = draw(model, [""] * 3, sampler, ts, [5, 6, 7])
    assert xs.shape == (5, 3, 2)
    for i, seed in enumerate((5, 6, 7)):
        alone = draw(model, [""], sampler, ts, seed)[1]
        assert torch.allclose(samples[i], alone[0], atol=1e-5), "one seed for one sample is that sample"
    assert torch.allclose(draw(model, [""] * 2, sampler, ts, [7, 5])[1], samples[[2, 0]], atol=1e-5)
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)


def test_what_shares_its_steps_is_drawn_alone() -> None:
    assert SAMPLERS["adaptive_ode"] not in BY_SAMPLE
    assert by_steps(ddim) not in BY_SAMPLE


def test_a_sample_comes_from_seed_prompt_and_number() -> None:
    alone = seeds_of(3, ["cat"] * 300)
    both = seeds_of(3, ["dog", "cat", "dog", "cat"])
    assert both[1::2] == alone[:2], "whatever the other prompts are"
    assert seeds_of(3, ["cat"] * 2, first=298) == alone[298:]
    others = [*seeds_of(3, ["dog"] * 300), *(s for seed in (0, 2, 4, 259, 256) for s in seeds_of(seed, ["cat"] * 300))]
    assert not {s % 2**32 for s in alone} & {s % 2**32 for s in others}, "other prompts and other seeds share nothing"
    assert len({s % 2**32 for s in alone}) == 300
    assert seeds_of(3, ["cat"] * 4, each=3) == alone[:12], "candidates are samples"
    with pytest.raises(SettingError, match="seed is -1"):
        seeds_of(-1, ["cat"])


def test_generators_share_the_rows_between_them() -> None:
    x, seeds = torch.zeros(6, 2), [5, 6, 7]
    drawn = normal_as(x, seeded(seeds, torch.device("cpu")))
    assert torch.equal(drawn[2:4], torch.randn(2, 2, generator=torch.Generator().manual_seed(6)))
    model = mixture(2, 3, 0)
    condition = model.condition([""] * 6)
    found = prior_of(model, condition, seeded(seeds, torch.device("cpu")))
    assert torch.equal(found[4:], model.prior(condition[torch.arange(2)], torch.Generator().manual_seed(7)))
