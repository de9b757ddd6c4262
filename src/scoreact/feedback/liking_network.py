"""A small network trained on answers by gradient descent, of which a fit then takes the last layer as its features.

Its utility is linear in these features and in those times the prompt's words, as the fit's own is. What raters are like is
taken from a fit that is there. A fifth of what it is given is not trained on and says when to stop.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from ..rewards.bradley_terry import BIAS, UtilitySpace
from ..rewards.sample_network import WIDTH, SampleNetwork
from .evidence import Evidence
from .preferences import Fitted, log_likelihoods

LEAST = 100  # answers: a network that learns from fewer has not been seen to be better
STEPS, BATCH = 600, 64  # at most; answers of each
PATIENCE = 10  # looks at what is not trained on without a gain
APART = 5  # one of so many groups is not trained on


def train_network(
    evidence: Evidence, known: Fitted, generator: torch.Generator, pairs: Tensor | None = None, ratings: Tensor | None = None
) -> SampleNetwork:  # fmt: skip
    """A network of these samples that foretells answers.

    Args:
        evidence: What was answered.
        known: A fit, whose raters are taken as they are.
        generator: Of the first weights, of what is not trained on, and of the batches.
        pairs, ratings: Which answers it may see, [A] bool each; all by default.
    """
    samples = evidence.samples.float()
    words = UtilitySpace.of(torch.zeros(2, 1), evidence.prompts, True).bag(evidence.prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network, head = SampleNetwork(samples.shape[1:]), nn.Linear(WIDTH, 1 + words.shape[1])
    offset = nn.Parameter(torch.zeros(words.shape[1]))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    over = None if samples.ndim > 3 else 0
    network.mean.copy_(samples.mean(over))
    network.scale.copy_(samples.std(over, correction=0) + 1e-4)
    parameters = [*network.parameters(), *head.parameters(), offset]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    taken = dataclasses.replace(known, weights=torch.ones(1).double())  # of the utility itself

    def loss(answers: Tensor) -> Tensor:
        """Mean of minus log P of answers by number: pairs first, then ratings."""
        count = len(evidence.pairs)
        some, others = evidence.pairs[answers[answers < count]], evidence.ratings[answers[answers >= count] - count]
        rows, place = torch.unique(torch.cat([some.first, some.second, others.sample]), return_inverse=True)
        seen, said = head(network(samples[rows])), words[rows]
        utility = seen[:, 0] + (seen[:, 1:] * said).sum(1) + BIAS * said @ offset
        first, second, sample = place.split([len(some), len(some), len(others)])
        found = log_likelihoods(
            taken, utility[:, None], dataclasses.replace(some, first=first, second=second),
            dataclasses.replace(others, sample=sample),
        )  # fmt: skip
        return -found.mean()

    learned, apart = _parts(evidence, generator, pairs, ratings)
    best, least, waited, every = copy.deepcopy(network.state_dict()), float("inf"), 0, max(10, len(learned) // BATCH)
    for step in range(STEPS + 1):
        if step % every == 0:
            network.eval()
            with torch.no_grad():
                now = float(loss(apart))
            network.train()
            if now < least:
                best, least, waited = copy.deepcopy(network.state_dict()), now, 0
            elif (waited := waited + 1) >= PATIENCE:
                break
        optimiser.zero_grad()
        loss(learned[torch.randint(len(learned), (min(BATCH, len(learned)),), generator=generator)]).backward()
        optimiser.step()
    network.load_state_dict(best)
    return network.eval().requires_grad_(False)


def _parts(
    evidence: Evidence, generator: torch.Generator, pairs: Tensor | None, ratings: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Numbers of answers to train on and others; what is about one task, or one rated sample, is in one of both."""
    count, rated = len(evidence.pairs), len(evidence.ratings)
    allowed = torch.cat([
        torch.ones(count, dtype=torch.bool) if pairs is None else pairs,
        torch.ones(rated, dtype=torch.bool) if ratings is None else ratings,
    ])  # fmt: skip
    numbers = torch.nonzero(allowed)[:, 0]
    names, place = torch.unique(evidence.groups()[numbers], return_inverse=True)
    apart = (torch.randperm(len(names), generator=generator) % APART == 0)[place]
    return numbers[~apart], numbers[apart]
