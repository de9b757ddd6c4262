"""Answers of people as a likelihood of utilities u = w . phi, and its maximum and posterior by Newton's method.

Of a pair (u, v), shown to rater r, the first one on side s = +1 (left) or -1, the weights of what may be answered:

    first exp(T u + s b / 2),  second exp(T v - s b / 2),  tie exp(n + T (u + v) / 2),  both bad exp(m)

T = exp(a) is how much r tells apart (0: nothing, careless) and b how far r leans to the left. Without ties and both bad the
odds are exp(T (u - v) + s b): Bradley & Terry 1952. The tie is Davidson's (1970). "Both bad" is chosen as a third sample of
utility m would be (Luce 1959), so it alone says where utilities stand. Of one sample a thumb or a score k of 1 to 5 is an
ordered logit: P(at most k) = sigmoid(c_k - T u - g), g the rater's leniency (McCullagh 1980).

Priors: w ~ N(0, 1 / precision); a, b, g ~ N(0, SPREAD^2); n, m, c wide. The most probable w and raters together would give one
rater all of w's freedom, so they take turns: w and its Laplace posterior given the raters, then what is most probable of the
raters in the mean over that posterior (expectation and maximisation; Raykar et al. 2010 find careless raters so). Answers know
T w alone: mean a is 0 in the fit, and utilities are then given in the unit of the median rater, whose T is 1. float64. Knows no
pictures, prompts or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from ..support.errors import FeedbackError

FIRST, SECOND, TIE, BOTH_BAD = 0, 1, -1, -2  # as in `answers`
SPREAD = 1.0  # prior standard deviation of a, b and g
WIDE = 5.0  # of n, m and c
START = (0.0, -1.5, -0.5, 0.5, 1.5)  # of c: of thumbs one, of scores four
CERTAIN = 1e6  # precision of the sum of a
SHARED = 7  # n, m and c: what all raters have in common
DRAWS = 4  # of weights, for means over their posterior
ROUNDS, TURNED = 20, 0.01  # turns of weights and raters: until raters move by less
FAR = 40.0  # a threshold beyond every other: its sigmoid is 1
NEVER = -1e3  # log weight of an answer that nobody gives


@dataclass(frozen=True)
class Compared:
    """A comparisons: rows `first` and `second` of the design, `winner` (FIRST, SECOND, TIE, BOTH_BAD), `side` of the first (1
    left, -1 right, 0 not known), row of the rater, and `weight`; each [A]."""

    first: Tensor
    second: Tensor
    winner: Tensor
    side: Tensor
    rater: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.winner)

    def __getitem__(self, index: Tensor) -> Compared:
        return Compared(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Rated:
    """A ratings: row `sample` of the design, `value` 0 or 1 of thumbs (`score` False), 1 to 5 of scores, row of the rater."""

    sample: Tensor
    value: Tensor
    score: Tensor
    rater: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Tensor) -> Rated:
        return Rated(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


NOTHING = torch.zeros(0, dtype=torch.int64)
NO_PAIRS = Compared(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING.double())
NO_RATINGS = Rated(NOTHING, NOTHING, NOTHING.bool(), NOTHING)


@dataclass(frozen=True)
class Fitted:
    """Weights and what raters are like.

    Args:
        weights, covariance: [R], [R, R].
        own: n, m, c [5], then of each rater a, b, g. own_spread: their standard deviations, given the weights' posterior.
        raters: how many.
        precision: of the weights' prior, in the same unit.
    """

    weights: Tensor
    covariance: Tensor
    own: Tensor
    own_spread: Tensor
    raters: int
    precision: float

    @property
    def tie(self) -> float:
        """n"""
        return float(self.own[0])

    @property
    def both_bad(self) -> float:
        """m"""
        return float(self.own[1])

    @property
    def thresholds(self) -> Tensor:
        """c [5]: that of thumbs, then those of scores."""
        return self.own[2:SHARED]

    def of_raters(self, which: int) -> tuple[Tensor, Tensor]:
        """a (0), b (1) or g (2) of each rater and its standard deviation, [raters] each."""
        rows = slice(SHARED + which * self.raters, SHARED + (which + 1) * self.raters)
        return self.own[rows], self.own_spread[rows]

    def logit(self, design: Tensor, pairs: Compared, moderated: bool = True, sides: bool = True) -> Tensor:
        """log odds that the first wins, where one does, [A].

        moderated: over the posterior of the weights (MacKay 1992). sides: whether it counts which of them stood on the left.
        """
        difference = design[pairs.first] - design[pairs.second]
        t, b = self.of_raters(0)[0][pairs.rater].exp(), self.of_raters(1)[0][pairs.rater]
        logit = t * (difference @ self.weights) + (pairs.side * b if sides else 0.0)
        if not moderated:
            return logit
        variance = t.square() * ((difference @ self.covariance) * difference).sum(1)
        return logit / (1 + torch.pi * variance / 8).sqrt()


def fit(
    design: Tensor, pairs: Compared = NO_PAIRS, ratings: Rated = NO_RATINGS, raters: int = 1, precision: float = 1.0,
    known: Fitted | None = None,
) -> Fitted:  # fmt: skip
    """The most probable weights, their covariance, and what raters are like.

    Args:
        design: phi of every sample, [N, R] float64.
        pairs, ratings: what was answered about its rows.
        raters: number of different ones.
        precision: of the weights' prior.
        known: a fit whose raters are taken as they are.

    Raises:
        FeedbackError: there is no answer.
    """
    if not len(pairs) + len(ratings):
        raise FeedbackError("there is no answer to fit a reward to; rate some pairs first.")
    answers = _Answers(design.double(), pairs, ratings, raters, precision)
    if known is not None:
        weights, covariance = answers.fit_weights(torch.zeros_like(design[0]).double(), known.own)
        return replace(known, weights=weights, covariance=covariance, precision=precision)
    weights, own = design.new_zeros(design.shape[1]).double(), answers.start
    noise = torch.randn(design.shape[1], DRAWS // 2, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.cat([noise, -noise], 1)
    for _ in range(ROUNDS):
        weights, covariance = answers.fit_weights(weights, own)
        before = own
        own = answers.move_raters(own, weights[:, None] + torch.linalg.cholesky(covariance) @ noise)
        if float((own - before).abs().max()) < TURNED:
            break
    weights = answers.fit_weights(weights, own)[0]
    return _in_units_of_the_median(weights, own, answers.covariance(weights, own), raters, precision)


def _in_units_of_the_median(weights: Tensor, own: Tensor, covariance: Tensor, raters: int, precision: float) -> Fitted:
    """The weights times T of the median rater, and all T over it; the covariance follows the derivatives."""
    width, a = len(weights), own[SHARED : SHARED + raters]
    median = SHARED + int(a.argsort()[(raters - 1) // 2])
    scale, moves = own[median].exp(), torch.eye(width + len(own)).double()
    moves[:width, :width] *= scale
    moves[:width, width + median] = scale * weights
    moves[width + SHARED : width + SHARED + raters, width + median] -= 1
    covariance = moves @ covariance @ moves.T
    own = own.clone()
    own[SHARED : SHARED + raters] -= own[median].clone()
    spread = covariance.diagonal()[width:].clamp(min=0).sqrt()
    return Fitted(scale * weights, covariance[:width, :width], own, spread, raters, precision / float(scale) ** 2)


def log_likelihoods(fitted: Fitted, design: Tensor, pairs: Compared = NO_PAIRS, ratings: Rated = NO_RATINGS) -> Tensor:
    """log P of each answer, weighted, by a fit: [A], of pairs and then of ratings. Has a gradient in the design."""
    answers = _Answers(design.double(), pairs, ratings, fitted.raters, fitted.precision)
    return torch.cat([block.each(fitted.weights[:, None], fitted.own) for block in answers.blocks])


# --- the sum over answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Answers of one kind: the log-likelihood of each is a function of few numbers.

    of: numbers [A, k] of the samples, [A, k'] of the rater and of all, constants [A, m] -> log-likelihoods [A].
    dense: the former are these [A, k, R] times the weights. index, sign [A, k']: the latter are these of `own`.
    """

    of: Callable[[Tensor, Tensor, Tensor], Tensor]
    dense: Tensor
    index: Tensor
    sign: Tensor
    constants: Tensor
    weight: Tensor

    def numbers(self, weights: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `of` is asked for C columns of weights [R, C], the answers of each after another."""
        numbers = (self.dense @ weights).permute(2, 0, 1)
        others = (self.sign * own[self.index]).repeat(len(numbers), 1)
        return numbers.flatten(0, 1), others, self.constants.repeat(len(numbers), 1)

    def each(self, weights: Tensor, own: Tensor) -> Tensor:
        """Weighted, in the mean over columns, [A]."""
        return self.weight * self.of(*self.numbers(weights, own)).unflatten(0, (-1, len(self.weight))).mean(0)

    def loss(self, weights: Tensor, own: Tensor) -> Tensor:
        return -self.each(weights, own).sum()

    def derivatives(self, weights: Tensor, own: Tensor, one: int, other: int) -> tuple[Tensor, Tensor]:
        """Of each answer's loss, in the mean over columns: in the samples' numbers (0) or the others (1), and from there in
        those numbers or the others, [A, k] and [A, k, k']."""
        samples, others, constants = self.numbers(weights, own)
        inputs = samples.detach().requires_grad_(), others.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(-self.of(*inputs, constants).sum(), inputs[one], create_graph=True)
            rows = [torch.autograd.grad(row.sum(), inputs[other], retain_graph=True)[0] for row in g.unbind(1)]
        g, h = (part.detach().unflatten(0, (-1, len(self.weight))).mean(0) for part in (g, torch.stack(rows, 1)))
        return self.weight[:, None] * g, self.weight[:, None, None] * h

    def add_in_weights(self, weights: Tensor, own: Tensor, gradient: Tensor, curvature: Tensor) -> None:
        """Of the negative log-likelihood, to [R] and [R, R] in place."""
        g, h = self.derivatives(weights[:, None], own, 0, 0)
        gradient += torch.einsum("ak,akr->r", g, self.dense)
        curvature += self.dense.flatten(0, 1).T @ (h @ self.dense).flatten(0, 1)

    def add_in_own(self, weights: Tensor, own: Tensor, convex: bool, gradient: Tensor, curvature: Tensor) -> None:
        """In the mean over columns of weights. convex: without an answer's negative curvature."""
        g, h = self.derivatives(weights, own, 1, 1)
        if convex:
            least, axes = torch.linalg.eigh(h)
            h = (axes * least.clamp(min=0)[:, None]) @ axes.mT
        gradient.index_add_(0, self.index.flatten(), (self.sign * g).flatten())
        among = self.sign[:, :, None] * h * self.sign[:, None, :]
        rows, columns = self.index[:, :, None].expand_as(among), self.index[:, None, :].expand_as(among)
        curvature.index_put_((rows.flatten(), columns.flatten()), among.flatten(), accumulate=True)

    def add_across(self, weights: Tensor, own: Tensor, curvature: Tensor) -> None:
        """The mixed second derivatives, to [R, own]."""
        across = self.sign[:, :, None] * (self.derivatives(weights[:, None], own, 1, 0)[1] @ self.dense)
        curvature += torch.zeros_like(curvature.T).index_add_(0, self.index.flatten(), across.flatten(0, 1)).T


def _pair(samples: Tensor, others: Tensor, constants: Tensor) -> Tensor:
    """u, v; a, s b, n, m; constants: the winner as one of four, then -1 of what nobody ever answers."""
    (u, v), (a, b, n, m) = samples.unbind(1), others.unbind(1)
    t = a.exp()
    gap, level = 0.5 * (t * (u - v) + b), 0.5 * t * (u + v)
    weights = torch.stack([gap, -gap, n, m - level], 1)  # each less the level
    weights = torch.where(constants[:, 4:] < 0, NEVER, weights)
    return (constants[:, :4] * weights).sum(1) - weights.logsumexp(1)


def _rating(samples: Tensor, others: Tensor, constants: Tensor) -> Tensor:
    """u; a, g, the thresholds below and above the answer; constants: -FAR or FAR where there is none, else 0."""
    a, g, low, high = others.unbind(1)
    at = a.exp() * samples[:, 0] + g
    low, high = low + constants[:, 0] - at, high + constants[:, 1] - at
    return torch.log(-torch.expm1(low - high)) + logsigmoid(high) + logsigmoid(-low)


def _pairs(design: Tensor, pairs: Compared, raters: int) -> _Block:
    kind = torch.where(pairs.winner >= 0, pairs.winner, 1 - pairs.winner)  # 0, 1, tie 2, both bad 3
    never = [0.0, 0.0, *(0.0 if bool((kind == k).any()) else -1.0 for k in (2, 3))]
    constants = torch.cat([one_hot(kind, 4).double(), torch.tensor(never).double().expand(len(kind), 4)], 1)
    place = torch.zeros_like(kind)
    index = torch.stack([SHARED + pairs.rater, SHARED + raters + pairs.rater, place, place + 1], 1)
    one = torch.ones(len(kind), dtype=torch.float64)
    sign = torch.stack([one, pairs.side.double(), one, one], 1)
    dense = torch.stack([design[pairs.first], design[pairs.second]], 1)
    return _Block(_pair, dense, index, sign, constants, pairs.weight.double())


def _ratings(design: Tensor, ratings: Rated, raters: int) -> _Block:
    below = ratings.value - ratings.score.long()  # thresholds below the answer
    last = torch.where(ratings.score, 4, 1)  # how many thresholds there are
    first = 2 + ratings.score.long()
    has_low, has_high = below > 0, below < last
    index = torch.stack([
        SHARED + ratings.rater, SHARED + 2 * raters + ratings.rater,
        first + torch.where(has_low, below - 1, 0), first + torch.where(has_high, below, 0),
    ], 1)  # fmt: skip
    one = torch.ones(len(last), dtype=torch.float64)
    sign = torch.stack([one, one, has_low.double(), has_high.double()], 1)
    constants = FAR * torch.stack([-(~has_low).double(), (~has_high).double()], 1)
    return _Block(_rating, design[ratings.sample][:, None], index, sign, constants, one)


class _Answers:
    """All answers: weights [R] and `own` [SHARED + 3 raters], each by Newton's method given the other."""

    def __init__(self, design: Tensor, pairs: Compared, ratings: Rated, raters: int, precision: float) -> None:
        self.start = torch.zeros(SHARED + 3 * raters, dtype=torch.float64)
        self.start[2:SHARED] = torch.tensor(START)
        self.prior = torch.cat([torch.full((SHARED,), WIDE**-2), torch.full((3 * raters,), SPREAD**-2)]).double().diag()
        self.prior[SHARED : SHARED + raters, SHARED : SHARED + raters] += CERTAIN
        self.precision = precision
        self.blocks = [_pairs(design, pairs, raters)] if len(pairs) else []
        self.blocks += [_ratings(design, ratings, raters)] if len(ratings) else []

    def loss(self, weights: Tensor, own: Tensor) -> Tensor:
        """Without priors, in the mean over columns of weights [R, C]."""
        return torch.stack([block.loss(weights, own) for block in self.blocks]).sum()

    def fit_weights(self, weights: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """[R] and the inverse of the second derivatives."""

        def loss(weights: Tensor) -> Tensor:
            return self.loss(weights[:, None], own) + 0.5 * self.precision * weights @ weights

        def derivatives(weights: Tensor, convex: bool) -> tuple[Tensor, Tensor]:  # convex it is
            gradient, curvature = self.precision * weights, self.precision * torch.eye(len(weights)).double()
            for block in self.blocks:
                block.add_in_weights(weights, own, gradient, curvature)
            return gradient, curvature

        return _newton(loss, derivatives, weights)

    def move_raters(self, own: Tensor, weights: Tensor) -> Tensor:
        """`own` after one step towards the best in the mean over columns of weights [R, C]."""

        def loss(own: Tensor) -> Tensor:
            return self.loss(weights, own) + 0.5 * (own - self.start) @ self.prior @ (own - self.start)

        def derivatives(own: Tensor, convex: bool) -> tuple[Tensor, Tensor]:
            gradient, curvature = self.prior @ (own - self.start), self.prior.clone()
            for block in self.blocks:
                block.add_in_own(weights, own, convex, gradient, curvature)
            return gradient, curvature

        return _newton(loss, derivatives, own, 1)[0]

    def covariance(self, weights: Tensor, own: Tensor) -> Tensor:
        """Of weights and `own` together, Laplace's; where that is none, of each by itself."""
        gradients = torch.zeros_like(weights), torch.zeros_like(own)
        inner, across = self.precision * torch.eye(len(weights)).double(), weights.new_zeros(len(weights), len(own))
        outers = self.prior.clone(), self.prior.clone()
        for block in self.blocks:
            block.add_in_weights(weights, own, gradients[0], inner)
            block.add_across(weights, own, across)
            for convex, outer in zip((False, True), outers, strict=True):
                block.add_in_own(weights[:, None], own, convex, gradients[1], outer)
        whole = torch.cat([torch.cat([inner, across], 1), torch.cat([across.T, outers[0]], 1)])
        factor, failed = torch.linalg.cholesky_ex(whole)
        if int(failed):
            factor = torch.linalg.cholesky(torch.block_diag(inner, outers[1]))
        return torch.cholesky_inverse(factor)


def _newton(
    loss: Callable[[Tensor], Tensor], derivatives: Callable[[Tensor, bool], tuple[Tensor, Tensor]], values: Tensor,
    most: int = 100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The least loss after `most` steps, and the inverse of the second derivatives before the last of them."""
    for _ in range(most):
        gradient, curvature = derivatives(values, False)
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if int(failed):
            factor = torch.linalg.cholesky(derivatives(values, True)[1])
        step = -torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        slope, length, now = float(gradient @ step), 1.0, loss(values)
        if -slope < 1e-8:
            break
        while not loss(values + length * step) <= now + 1e-4 * length * slope and length > 1e-8:
            length *= 0.5
        values = values + length * step
    return values, torch.cholesky_inverse(factor)
