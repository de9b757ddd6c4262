"""What a run is made of, built from its settings: device, value, rule, minimiser, exploration; and what is checked first.

Knows settings and every part; does not know the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..algorithms.base import Rule
from ..algorithms.ctrl_pathwise import CTRLPathwise
from ..algorithms.registry import find_rule
from ..control.critic import Critic
from ..control.linear_value import LinearHead, RidgeFit
from ..control.policy import Policy
from ..control.ridge_decoder import RidgeDecoder
from ..control.ridge_surrogate import RidgeSurrogate, features_by_name
from ..control.rollout import Exploration, epsilon_greedy, gaussian_actions
from ..control.surrogate_settings import OWN_FEATURES
from ..control.surrogate_value import SurrogateFit, SurrogateValue
from ..control.transitions import Batch, Rows
from ..control.value import ResidualValue, ValueNetwork
from ..control.value_fit import ValueFit
from ..dynamics import girsanov
from ..dynamics.sde import SDE
from ..dynamics.solvers import SOLVERS
from ..models.base import BatchDependent, HasClasses, ReadsFeatures, ScoreModel
from ..rewards.base import is_differentiable, is_of_batch, name_of
from ..rewards.batch import FEWEST
from ..rewards.check import Checked, HasParts, checked
from ..rewards.sample_features import SIDE
from ..rewards.user import with_gradient
from ..support import distributed
from ..support.devices import device_of
from ..support.errors import Diverged, RewardError, SettingError
from ..types import Condition
from .config import Config
from .optim import AdamSteps, NaturalGradient


def exploration_of(config: Config, sde: SDE) -> Exploration | None:
    if config.exploration == "gaussian":
        return gaussian_actions(lambda t: config.exploration_scale * sde.schedule.sigma(t))
    if config.exploration == "epsilon_greedy":
        return epsilon_greedy(config.exploration_scale)
    return None


def _default_value_network(model: ScoreModel, inputs: str, prompts: Sequence[str]) -> nn.Module:
    """An MLP on flattened states: right for points and short series; pictures deserve a convolutional one."""
    from ..models.value_networks import VectorValue

    known = list(prompts) or (list(model.classes) if isinstance(model, HasClasses) else [""])
    probe = model.prior(model.condition(known[:1]), torch.Generator(device_of(model)).manual_seed(0))
    return VectorValue(probe[0].numel() * (2 if inputs == "both" else 1))


def build_value(
    config: Config,
    policy: Policy,
    sde: SDE,
    make: Callable[[], nn.Module] | None,
    reward_of_state: Callable[[Tensor, Condition], Tensor],
    prompts: Sequence[str] = (),
    surrogate: RidgeSurrogate | None = None,
) -> ValueNetwork:
    """The value network that the settings describe, untrained; reward_of_state: of x_data_hat, for value "residual".

    prompts: that the model knows, for the default network where the model cannot list its own.
    """
    if config.value == "surrogate" and surrogate is not None:
        return SurrogateValue(surrogate, sde, policy)
    link = config.kl_weight if config.value_loss == "log_probability" else None
    if config.value == "linear":
        if not isinstance(policy.reference, ReadsFeatures):
            raise SettingError(
                f"value is 'linear', but {type(policy.reference).__name__} has no features of its own to read; "
                "use value network."
            )
        policy.reference.keep_features()
        return ValueNetwork(LinearHead(sde.schedule), sde, policy, log_sigmoid=link)
    inputs = config.value_inputs if config.value == "network" else "x_data_hat"
    network = make() if make is not None else _default_value_network(policy.model, inputs, prompts)
    if config.value == "network":
        return ValueNetwork(network, sde, policy, config.value_inputs, link)
    return ResidualValue(network, sde, policy, reward_of_state)


def check_value(value: ValueNetwork, model: ScoreModel, prompts: Sequence[str]) -> None:
    """The value network takes what value_inputs gives it. Raises ValueError before anything is spent."""
    if value.inputs in ("features", "sample features"):
        return
    condition, device = model.condition(prompts[:1]), device_of(model)
    x = model.prior(condition, torch.Generator(device).manual_seed(0))
    seen = torch.cat([x, x], dim=1) if value.inputs == "both" else x
    try:
        with torch.no_grad():
            value.calls += len(x)
            value.network(seen, torch.full((len(x),), 0.5, device=device), condition)
    except RuntimeError as error:
        raise SettingError(
            f"the value network cannot take value_inputs {value.inputs!r}, here of shape {tuple(seen.shape[1:])} "
            f"({' '.join(str(error).split())[:160]}). Use a network made for these, or another value_inputs."
        ) from error


def check_idle(config: Config, rule: Rule) -> list[str]:
    """What the settings' records cannot know, as it depends on parts: a setting that does nothing is refused.

    Returns sentences on one that does less than it says.
    """
    c = config
    if c.exploration != "none":
        steps = rule.stochastic_steps(c.steps, torch.Generator(device_of(rule.policy.model)))
        if rule.own_rows or (steps is not None and not bool(steps.any())):
            raise SettingError(
                f"exploration is {c.exploration!r}, but {c.algorithm} draws no step from the SDE with these settings; leave it "
                "out."
            )
    notes = []
    reward = rule.reward
    if (
        c.value == "residual"
        and isinstance(rule, CTRLPathwise)
        and reward is not None
        and not is_differentiable(reward)
    ):
        notes.append(
            f"{c.algorithm} follows the value's gradient, and reward {name_of(reward)} has none, so of value residual it "
            "follows the network alone. Take value surrogate, whose gradient is in closed form, or algorithm ctrl."
        )
    inputs = rule.critic.value.inputs if rule.critic is not None else c.value_inputs
    if c.uses("value_inputs") and c.value_inputs not in ("both", inputs):
        raise SettingError(
            f"value_inputs is {c.value_inputs!r}, but the value network sees {inputs!r} by its own word; leave it out."
        )
    reused = c.rule.get("reuse_reference", 0)
    if reused > c.reference_batches:
        notes.append(
            f"reuse_reference is {reused}, and the {c.reference_batches} of reference_batches are all that is reused."
        )
    return notes


def check_batch_reward(config: Config, reward: Checked) -> list[str]:
    """A reward of samples together is asked for whole batches only. Sentences on what it means; SettingError else."""
    if not is_of_batch(reward.reward):
        return []
    c, what = config, f"reward {reward.name} is of samples together"
    if c.surrogate or (c.uses("value") and c.value == "residual"):
        used = f"value {c.value}" if c.uses("value") and c.value in ("residual", "surrogate") else "a surrogate"
        raise SettingError(
            f"{what}, and {used} wants the reward of single states; use value network or linear, and reward_gradient exact."
        )
    if c.rule.get("baseline") == "denoised":
        raise SettingError(f"{what}, and baseline denoised wants the reward of single states; leave it out.")
    if c.reward_failures:
        raise SettingError(
            f"{what}, and reward_failures is {c.reward_failures}: a batch that fails would be asked in halves, which are other "
            "batches. Set it to 0."
        )
    if c.rule.get("samples") == "reference" and c.rule.get("replay", 1) > 1:
        raise SettingError(
            f"{what}, and replay is {c.rule['replay']}: what is remembered are contributions to other batches. Set it to 1."
        )
    kind = find_rule(c.algorithm)
    if kind.differentiates_reward and not kind.transitions_only:  # the reward is asked for inside the loss
        rest = c.batch_size * (1 + c.rule.get("renoise", 0)) % c.minibatch_size
        if c.minibatch_size < FEWEST or 0 < rest < FEWEST:
            raise SettingError(
                f"{what}, and its gradient is that of a minibatch: of batch_size {c.batch_size} and minibatch_size "
                f"{c.minibatch_size} some have fewer than {FEWEST} samples. Let minibatch_size divide batch_size."
            )
    notes = [
        f"{what}: a sample's value is what it adds to a measure of its batch, and the mean of these values is "
        "maximised. There is no tilted law, so J* is not to be trusted."
    ]
    if distributed.world() > 1:
        notes.append(
            f"{what}: each of {distributed.world()} processes has batches of its own, of its share of the samples."
        )
    return notes


def build_critic(config: Config, value: ValueNetwork, policy: Policy, sde: SDE) -> Critic:
    """The critic of the policy, which learns `value` as the settings say."""
    c = config
    if c.value == "linear":
        fitter: ValueFit = RidgeFit(value, c.kl_weight, c.value_loss, replay=c.value_replay)
    elif isinstance(value, SurrogateValue):
        fitter = SurrogateFit(value, c.kl_weight, c.value_loss, replay=c.value_replay)
    else:
        fitter = ValueFit(
            value, c.kl_weight, c.value_loss, c.value_learning_rate, c.value_steps, c.value_first_steps,
            c.value_batch_size, c.value_replay, weight_decay=c.value_weight_decay,
        )  # fmt: skip
    return Critic(fitter, policy, sde, SOLVERS[c.solver])


def build_surrogate(config: Config, model: ScoreModel, prompts: Sequence[str]) -> RidgeSurrogate | None:
    """The stand-in for the reward, not fitted yet, where the settings ask for one."""
    if not config.surrogate:
        return None
    generator = torch.Generator(device_of(model)).manual_seed(0)
    with torch.no_grad():
        states = model.prior(model.condition(prompts[:1]), generator)
        samples = model.decode(states)
        decoder = ridge_decoder(config, states, samples)
        network = features_by_name(config.surrogate_features, samples if decoder is None else decoder(states))
    link = config.kl_weight if config.surrogate_target == "logit" else None
    return RidgeSurrogate(network, prompts, link, likelihood=config.surrogate_prompts, decoder=decoder)


def ridge_decoder(config: Config, states: Tensor, samples: Tensor) -> RidgeDecoder | None:
    """What decodes states for a surrogate in the model's place; None: the model does. Pictures are `samples` of `states`."""
    if not config.uses("surrogate_decoder") or config.surrogate_decoder == "full":
        return None
    own = config.surrogate_features in OWN_FEATURES
    if config.surrogate_decoder == "ridge":
        if not own:
            raise SettingError(
                f"surrogate_decoder ridge gives small pictures, and surrogate_features {config.surrogate_features!r} is a "
                "network of yours that expects the samples themselves; set surrogate_decoder to full."
            )
        return RidgeDecoder(states, samples)
    large = states.ndim == samples.ndim == 4 and min(samples.shape[2:]) >= 2 * SIDE
    return RidgeDecoder(states, samples) if own and large and samples.shape[2] % states.shape[2] == 0 else None


def build_rule(
    config: Config, critic: Critic, reward: Checked, prompts: Sequence[str], surrogate: RidgeSurrogate | None = None
) -> Rule:
    """The update rule that the settings name; surrogate: what it follows in the reward's place.

    Raises ValueError when it needs the reward's gradient and there is none.
    """
    kind = find_rule(config.algorithm)
    if kind.differentiates_reward and config.reward_gradient == "exact":
        check_differentiable(config.algorithm, critic.policy.model, reward, prompts)
    if kind.fits_value and config.value == "residual":  # its gradient is the reward's, where there is one
        with suppress(SettingError):
            check_differentiable(config.algorithm, critic.policy.model, reward, prompts)
    own, followed = critic if kind.fits_value else None, surrogate if config.reward_gradient == "surrogate" else reward
    rule = kind(critic.policy, critic.sde, critic.solver, own, config.kl_weight, followed, **config.rule)
    explores = config.exploration != "none" and config.rule.get("last_steps", 0) > 0
    if rule.differentiates_reward and (surrogate is not None or explores):
        rule.own_rows = False  # a surrogate wants the rewards of a rollout, and only a rollout explores
    return rule


def build_minimiser(config: Config, rule: Rule) -> AdamSteps | NaturalGradient:
    """What turns the rule's loss into a step."""
    c, parameters = config, rule.policy.trainable()
    if rule.minimiser == "natural_gradient":
        return NaturalGradient(parameters, c.max_kl, c.rule["damping"], c.rule["cg_steps"])
    return AdamSteps(
        parameters, c.learning_rate, c.epochs, c.minibatch_size, c.accumulate, c.max_kl, c.max_gradient_norm,
        kl_states=c.kl_states,
    )  # fmt: skip


def check_differentiable(algorithm: str, model: ScoreModel, reward: Checked, prompts: Sequence[str]) -> None:
    """Rules that follow the reward's gradient need one; marks the reward when it is there.

    A function of the user's without the mark `differentiable` is tried too: whoever chose such a rule wants its gradient.
    """
    condition = model.condition(list(prompts[:1]) * (FEWEST if is_of_batch(reward.reward) else 1))
    device = device_of(model)
    x = model.prior(condition, torch.Generator(device).manual_seed(0)).requires_grad_(True)
    found = with_gradient(reward.reward)
    probe = checked(found)
    probe.differentiable = True  # makes it look for the gradient
    try:
        with torch.enable_grad():
            decoded = model.decode(x)
            probe(decoded, condition)
            parts: dict[str, Tensor] = found.parts(decoded, condition) if isinstance(found, HasParts) else {}
            for name, values in parts.items():
                if not values.requires_grad:  # the others' gradient would hide it
                    raise RewardError(f"its part {name} carries no gradient")
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:160]
        if "is marked differentiable" in why and not is_differentiable(found):  # a part of it is not
            why = "its result carries no gradient; give each function in it the mark f.differentiable = True"
        raise SettingError(
            f"{algorithm} follows the reward's gradient, but reward {reward.name} has none ({why}). Make it "
            "differentiable, set reward_gradient to surrogate, or use a rule that needs its values only: "
            "ctrl, ctrl_pathwise, q_learning."
        ) from error
    reward.reward, reward.differentiable = found, True


def check_ratio(rule: Rule, rows: Rows) -> None:
    """Before the first update the policy is its own behaviour: every ratio must be 1. Raises Diverged if not."""
    if not isinstance(rows, Batch):
        return
    part = rows[torch.arange(min(len(rows), 256), device=rows.t0.device)]
    with torch.no_grad():
        worst = float(girsanov.log_ratio(rule.shift(part), part.noise).abs().max())
    limit = 1e-5 * max(1.0, part.x[0].numel() ** 0.5)
    model = rule.policy.model
    if not worst <= limit and not (isinstance(model, BatchDependent) and model.batch_dependent):
        error = Diverged(
            f"before the first update log-ratios reach {worst:.2g} instead of 0: the model's score depends on the batch "
            "or is random. Put the model in eval mode and remove dropout, compute it in float32, or give the network always "
            "as many states at once (rows_per_call)."
        )
        error.hopeless = True
        raise error
