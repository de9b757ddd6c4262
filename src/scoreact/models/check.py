"""What a user's model has of the contract, what its optional members would buy, and what is wrong with it, in sentences.

Found by running it on a few samples: it draws them, noises them again and asks for their score. Knows models and the
equation; does not know rewards, training or files, and does not print.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..support.devices import HasDevice
from . import base
from .base import ScoreModel
from .lora import described
from .trial import Trial

# the optional members, by the protocol that holds each; one sentence says what it buys
OPTIONAL: tuple[tuple[type, str, str], ...] = (
    (base.HasReference, "reference()", "the pretrained model without a second copy in memory"),
    (base.HasClasses, "classes", "unknown prompts refused with the list, and a default value network for your prompts"),
    (base.HasPath, "suited_path", "a solver, grid and number of steps that suit the model, where a user gives none"),
    (
        base.ReadsFeatures,
        "features() and keep_features()",
        'value="linear", which needs far fewer rewards than a network',
    ),
    (base.HasRowsPerCall, "rows_per_call", "bounded memory for gradients through the reference"),
    (base.BatchDependent, "batch_dependent", "a run that goes on where the batch changes the last bits of a score"),
    (base.Rounds, "rounds", "the path KL that rounding alone costs, measured before training"),
    (base.HasGuidance, "guidance_scale", "samples at another guidance"),
    (base.Exports, "export()", "weights in your own library's form in every run folder"),
    (base.Saves, "formats, save() and facts()", "`scoreact export` in the forms that other programs load"),
    (base.StartsElsewhere, "starts_elsewhere", "both the model and its reference evaluated before training"),
    (
        base.HasPriorDensity,
        "prior_log_prob()",
        "log-likelihoods from a prior that is no normal noise of the schedule's",
    ),
    (base.HasExactLaw, "exact_law()", "the closed-form optimum in the report's picture of points"),
    (base.HasMetadata, "metadata", "metadata of prompts for the reward"),
    (base.HasNotes, "notes()", "sentences of the model's own in the run's report"),
    (base.HasReferenceDigest, "reference_digest()", "a resumed run that knows its reference among shared weights"),
    (base.HasAdapters, "merged()", "adapters written back into your own plain network"),
    (HasDevice, "device", "the right device where the parameters do not say which"),
)
REQUIRED = {
    "schedule": "a property with alpha(t), sigma(t), their derivatives, t_min and t_max; see `dynamics.schedule`",
    "prior": "prior(condition, generator) -> states at t_min, [B, *D]",
    "condition": "condition(prompts) -> Condition(prompts, rows)",
    "score": "score(t, x, condition) -> grad log p_t(x), [B, *D] float32",
    "decode": "decode(x) -> what a reward sees, [B, ...]",
}


def check_model(model: object, prompts: Sequence[str] | None = None) -> list[str]:
    """What a model has of the contract, and what is wrong with it.

    Args:
        model: what a user built; a `ScoreModel` if all is well. Left as it was found: weights, mode and random state.
        prompts: that it is meant to be asked for; its `classes` by default, else "".

    Returns:
        Sentences that start with "fine: ", "note: " or "problem: "; the last one is the summary, which starts with "fine: " or
        with the number of problems.
    """
    name = type(model).__name__
    lines: list[str] = []
    missing = [member for member in REQUIRED if not hasattr(model, member)]
    if missing:
        lines += [f"problem: {name} has no `{member}`: {REQUIRED[member]}." for member in missing]
        if isinstance(model, nn.Module) and {"score", "prior"} <= set(missing):
            lines.append(
                "note: it seems to be a bare network; NetworkModel(network, schedule, prediction, shape) makes a model of one."
            )
    else:
        lines.append(f"fine: {name} has the five members that every model has: {', '.join(REQUIRED)}.")
    lines += _optional(model)
    lines += _weights(model, name)
    if not missing and isinstance(model, ScoreModel):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            lines += Trial(model, name).all(prompts)
    problems = sum(line.startswith("problem") for line in lines)
    if problems:
        return [*lines, f"{problems} problem{'s' * (problems > 1)} in model {name}."]
    return [*lines, f"fine: {name} can be fine-tuned."]


def _optional(model: object) -> list[str]:
    lines = []
    for protocol, member, buys in OPTIONAL:
        if isinstance(model, protocol):
            names = [part.strip(" ()") for part in member.replace(" and ", ",").split(",")]
            wrong = [n for n in names if isinstance(getattr(model, n), nn.Module)]
            if wrong and "()" in member:  # a layer that happens to have the name
                lines.append(
                    f"problem: `{wrong[0]}` is a {type(getattr(model, wrong[0])).__name__}, but the contract has a method of "
                    "that name; rename the submodule."
                )
            else:
                lines.append(f"fine: has `{member}`: {buys}.")
        else:
            lines.append(f"note: has no `{member}`, which is optional and buys {buys}.")
    return lines


def _weights(model: object, name: str) -> list[str]:
    """What training would change, and what would not follow the model to another device."""
    if not isinstance(model, nn.Module):
        return [f"problem: {name} is no nn.Module, so nothing of it can be trained; derive it from torch.nn.Module."]
    trainable = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trainable)
    if trainable:
        lines = [
            f"fine: {numbers:,} numbers in {len(trainable)} parameters with requires_grad are what training changes."
        ]
    else:
        lines = ["problem: no parameter has requires_grad, so there is nothing to train; model.requires_grad_(True)."]
    lines += described(model)
    low = sorted({str(p.dtype) for p in trainable if p.dtype in (torch.float16, torch.bfloat16)})
    if low:
        lines.append(
            f"problem: parameters to train are {', '.join(low)}, in which small steps round to nothing; keep them in float32 "
            "and use autocast (NetworkModel's bfloat16=True)."
        )
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.numel() and not key.startswith("_"):
                where = f"{path}.{key}" if path else key
                lines.append(
                    f"problem: `{where}` is a plain tensor, which `.to(device)` leaves behind; make it a buffer: "
                    f'self.register_buffer("{key}", ...).'
                )
    random = sorted(
        {
            type(m).__name__
            for m in model.modules()
            if m.training and isinstance(m, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm)
        }
    )
    if random:
        lines.append(
            f"note: {', '.join(random)} is in training mode; a run puts the model into eval mode, and so is it looked at here."
        )
    return lines
