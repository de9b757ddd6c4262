"""How well a sample tells its prompt: Bayes' rule where it is known, gradients, and what it saves a surrogate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scoreact.control.prompt_likelihood import FLOOR, PromptLikelihood
from scoreact.control.ridge_surrogate import RidgeSurrogate
from scoreact.types import Condition

PROMPTS = ["a red circle", "a red square", "a blue circle", "a blue square"]


def normal_samples(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples [size, 3], their prompts' numbers, the prompts' means [4, 3] (by word), and the common covariance's root."""
    colour = torch.tensor([[1.5, 0.0, 0.5], [-1.5, 0.0, -0.5]], dtype=torch.float64)
    shape = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    means = (colour[:, None] + shape[None]).flatten(0, 1)
    root = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.1]], dtype=torch.float64)
    number = torch.arange(size) % 4
    noise = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return means[number] + noise @ root, number, means, root


def words(number: Tensor) -> Tensor:
    surrogate = RidgeSurrogate(nn.Flatten(), PROMPTS)
    return surrogate.bag(Condition([PROMPTS[i] for i in number.tolist()])).double()


def test_it_is_the_posterior_of_normal_samples(generator: torch.Generator) -> None:
    z, number, means, root = normal_samples(20_000, generator)
    found = PromptLikelihood(z, words(number))
    fresh, number, _, _ = normal_samples(2_000, generator)
    density = torch.distributions.MultivariateNormal(means, root.T @ root)
    log_p = density.log_prob(fresh[:, None]).log_softmax(1)[torch.arange(2_000), number]
    expected = ((1 - FLOOR) * log_p.exp() + FLOOR / 5).log()
    told = found(fresh, words(number)) * found.tensors["spread"] + found.tensors["center"]
    # the covariance is shrunk by a fifth, which moves the log-odds a little
    assert float((told - expected).abs().mean()) < 0.08
    assert float(torch.corrcoef(torch.stack([told, expected]))[0, 1]) > 0.99


def test_it_is_standardised_and_has_the_gradient_of_its_value(generator: torch.Generator) -> None:
    z, number, _, _ = normal_samples(400, generator)
    q = words(number)
    likelihood = PromptLikelihood(z, q)
    found = likelihood(z, q)
    assert abs(float(found.mean())) < 1e-9
    assert abs(float(found.std()) - 1) < 1e-9
    some = z[:5].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: likelihood(x, q[:5]), (some,))


def test_a_prompt_of_words_that_were_never_together_is_compared_with_the_others(generator: torch.Generator) -> None:
    z, number, means, _ = normal_samples(4_000, generator)
    kept = number != 3  # no blue square was ever seen
    likelihood = PromptLikelihood(z[kept], words(number[kept]))
    square = words(torch.tensor([3]))
    at = [float(likelihood(mean[None], square)) for mean in means]
    assert max(at) == at[3]


def test_a_surrogate_needs_fewer_rewards_with_it(generator: torch.Generator) -> None:
    """The reward is whether the sample fits its prompt; 32 are asked, the prompts of 600 are known."""
    x, number, means, root = normal_samples(1_200, generator)
    x = torch.cat([x, torch.randn(1_200, 40, generator=generator, dtype=torch.float64)], dim=1).float()
    density = torch.distributions.MultivariateNormal(means, root.T @ root)
    rewards = density.log_prob(x[:, None, :3].double()).log_softmax(1)[torch.arange(1_200), number].float()
    condition = Condition([PROMPTS[i] for i in number.tolist()])
    explained = []
    for likelihood in (False, True):
        surrogate = RidgeSurrogate(nn.Flatten(), PROMPTS, likelihood=likelihood)
        asked, others, fresh = torch.arange(32), torch.arange(32, 600), torch.arange(600, 1_200)
        surrogate.add(x[asked], condition[asked], rewards[asked])
        surrogate.look(x[others], condition[others])
        surrogate.fit()
        error = surrogate(x[fresh], condition[fresh]) - rewards[fresh]
        explained.append(1 - float(error.var() / rewards[fresh].var()))
    assert explained[1] > explained[0] + 0.25


def test_one_prompt_tells_nothing(generator: torch.Generator) -> None:
    surrogate = RidgeSurrogate(nn.Flatten(), [""], likelihood=True)
    x = torch.randn(20, 2, generator=generator)
    surrogate.add(x, Condition([""] * 20), x.sum(1))
    surrogate.fit()
    assert surrogate.likelihood is None
    assert math.isfinite(float(surrogate(x, Condition([""] * 20)).sum()))


def test_a_resumed_surrogate_has_the_same_likelihood(generator: torch.Generator) -> None:
    x, number, _, _ = normal_samples(80, generator)
    x, condition = x.float(), Condition([PROMPTS[i] for i in number.tolist()])
    surrogate, other = (RidgeSurrogate(nn.Flatten(), PROMPTS, likelihood=True) for _ in range(2))
    surrogate.add(x, condition, x.sum(1))
    surrogate.fit()
    other.load_state_dict(surrogate.state_dict())
    assert torch.equal(other(x, condition), surrogate(x, condition))
    assert other.likelihood is not None
