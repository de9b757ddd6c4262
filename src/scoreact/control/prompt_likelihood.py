"""How well a sample tells its prompt, among the pretrained model's own samples: a feature that costs no reward call.

    l(z, c) = log( (1 - FLOOR) p(c | z) + FLOOR / C ),    p(c | z) = softmax over C prompts of m_c' S^-1 z - m_c' S^-1 m_c / 2

Linear discriminant analysis on features z of samples whose prompts are known, which is all that it is fitted to: the mean m_c
is linear in the prompt's words q_c, S is the pooled covariance, shrunk. Where a reward asks that a sample fits its prompt, l
says most of it before any reward is known; where it does not, a regression on l gives it no weight.
Source: Fisher 1936; the floor bounds what one unlikely sample says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOOR = 0.1  # share of the prompts that are as good as drawn at random
SHRINKAGE = 0.2  # of the covariance towards a multiple of the identity
PRIOR = 5.0  # observations that say a word changes nothing
CONTRASTS = 64  # prompts at most that a sample's own is compared with


class PromptLikelihood:
    """l above, standardised: (features z [B, F], words q [B, Q]) -> [B], with a gradient in z."""

    def __init__(self, z: Tensor, q: Tensor) -> None:
        """Solve for m and S.

        Args:
            z: features of samples [n, F].
            q: the words of their prompts as unit vectors [n, Q]; at least two rows that differ.
        """
        contrasts = torch.unique(q, dim=0)
        # evenly over the sorted rows: the same for the same prompts
        every = torch.linspace(0, len(contrasts) - 1, min(CONTRASTS, len(contrasts))).long()
        self.tensors = {"z_mean": z.mean(0), "q_mean": q.mean(0), "contrasts": contrasts[every]}
        centred, words = z - self.tensors["z_mean"], q - self.tensors["q_mean"]
        by_word = torch.linalg.solve(words.T @ words + PRIOR * torch.eye(q.shape[1]).to(q), words.T @ centred)  # [Q, F]
        rest = centred - words @ by_word
        covariance = rest.T @ rest / len(rest)
        level = covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        covariance = torch.lerp(covariance, level, SHRINKAGE)
        self.tensors |= {"by_word": by_word, "direction": torch.linalg.solve(covariance, by_word.T)}  # [F, Q]
        self.tensors |= {"center": z.new_zeros(()), "spread": z.new_ones(())}
        found = self(z, q)
        self.tensors |= {"center": found.mean(), "spread": found.std().clamp(min=1e-6)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PromptLikelihood:
        """One that was solved for before, from its `tensors`."""
        found = cls.__new__(cls)
        found.tensors = dict(tensors)
        return found

    def __call__(self, z: Tensor, q: Tensor) -> Tensor:
        c = {name: tensor.to(z) for name, tensor in self.tensors.items()}
        seen = (z - c["z_mean"]) @ c["direction"]  # [B, Q]

        def fits(words: Tensor) -> tuple[Tensor, Tensor]:
            centred = words - c["q_mean"]
            return centred, ((centred @ c["by_word"]) * (centred @ c["direction"].T)).sum(1) / 2

        own_words, own_cost = fits(q.to(z))
        other_words, other_cost = fits(c["contrasts"])
        own = (seen * own_words).sum(1) - own_cost
        others = seen @ other_words.T - other_cost
        same = torch.cdist(q.to(z), c["contrasts"]) < 1e-4  # the sample's own prompt is no contrast to itself
        others = others.masked_fill(same, -torch.inf)
        log_p = own - torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1)
        floor = FLOOR / (1 + len(c["contrasts"]))
        found = torch.logaddexp(log_p + torch.log1p(torch.tensor(-FLOOR)).to(z), torch.tensor(floor).log().to(z))
        return (found - c["center"]) / c["spread"]
