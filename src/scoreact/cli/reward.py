"""The commands `reward ...`, which make a reward: words in, a folder out that `train --reward` takes. They train nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..runs.source import build_policy, open_source, short_name
from ..support.errors import RewardError, SettingError
from ..support.loading import is_spec
from ..support.seeds import LARGEST
from .parser import Parser, assignments, positive, whole
from .train import source_with


def discriminate_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="RECIPE|RUN_DIR",
        help="whose samples: a recipe, a pipeline, my_model.py:build; of a run the tuned model",
    )
    add("--data", required=True, metavar="PATH", help="real examples: a folder of pictures or of a folder a class, an .npz or "
        ".npy, a table")  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder for the reward")
    add("--features", default="convolution", metavar="SPEC", help="what it sees: convolution, pixels, values, classifier, "
        "imagenet, or file.py:function [default convolution]")  # fmt: skip
    add("--features-option", action="append", default=[], metavar="NAME=VALUE", help="an option of these features")
    add(
        "--labels",
        metavar="NAME",
        help="the array or column of the classes [default labels, where the model has classes]",
    )
    add("--no-labels", action="store_true", help="one head for all classes of the model")
    add(
        "--samples",
        type=whole(2),
        default=6000,
        metavar="INT",
        help="of the model, and real ones at most [default 6000]",
    )
    add(
        "--steps",
        type=whole(1),
        metavar="INT",
        help="of the model's paths, as it will be tuned [default: the recipe's]",
    )
    add("--solver", metavar="NAME", help="of the model's paths [default: the recipe's]")
    add("--grid", metavar="NAME", help="of the model's paths [default: the recipe's]")
    add("--ridge", type=positive, metavar="FLOAT", help="smoothness of the head [default: by cross-validation]")
    add("--clip", type=positive, default=6.0, metavar="NATS", help="beyond it the reward hardly changes [default 6]")
    add("--onto", metavar="REWARD", help="of a run that was tuned to it: the next round, the new log-ratio added to it")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the samples and the folds [default 0]")
    add("--weights", choices=["final", "best"], default="final", help="of a run [default final]")


def discriminate(options: argparse.Namespace) -> int:
    """Fit a discriminator and say how good it is."""
    from ..feedback.discriminate import discriminate as fit
    from ..report.progress import waiting
    from ..rewards.learned import LearnedReward, open_learned

    out = new_reward(options.out)
    if options.labels and options.no_labels:
        raise SettingError("--labels and --no-labels are both given; leave one out.")
    onto = None
    if options.onto is not None:
        own = options.features if is_spec(options.features) else None  # code is named again
        if "features_option" in options.given or ("features" in options.given and own is None):
            raise SettingError("--features are those of the reward that --onto names; leave them out.")
        onto = open_learned(options.onto, features=own)
        if not isinstance(onto, LearnedReward):
            raise RewardError(f"--onto {options.onto} is a reward of another kind; give one that this command made.")
    source = open_source(options.source)
    config = source.config
    policy, _, which = build_policy(source, options.weights)
    with waiting("sampling and fitting"):
        reward = fit(
            policy.model,
            options.data,
            out,
            features=options.features,
            features_options=assignments(options.features_option, "--features-option"),
            labels=False if options.no_labels else options.labels,
            onto=onto,
            samples=options.samples,
            steps=options.steps or config.steps,
            solver=options.solver or config.solver,
            grid=options.grid or config.grid,
            ridge=options.ridge,
            clip=options.clip,
            seed=options.seed,
        )
    for note in reward.facts["notes"]:
        print(f"note: {note}")
    print("\n".join(said_of(reward, f"{which} {short_name(source.recipe)}")))
    print(
        f"reward     {out}; `scoreact train ... --reward {out} --steps {options.steps or config.steps} --kl-weight 1`"
    )
    return 0


def said_of(reward: Any, model: str) -> list[str]:
    """What was found, in a few lines."""
    f, heads = reward.facts, len(reward.bias)
    chosen = "by cross-validation" if f["ridges"] else "as given"
    return [
        f"AUC        {f['auc']:.3f} ± {f['auc_half_width']:.3f} (95 %): so often a held-out real example is told from a "
        f"sample of the {model} model; 0.5 is not at all",
        f"off        {f['calibration_error']:.3f}: its probabilities from the shares found; reliability.png",
        f"ridge      {f['ridge']:.3g}, {chosen}; {heads} head{'s' * (heads > 1)} on {len(reward.mean)} features "
        f"({reward.features.spec}), fitted on {f['fitted_on']:,} examples",
    ]


def new_reward(out: Path) -> Path:
    """Raises SettingError for a name that the package has, RunExists for a folder with something in it."""
    from ..rewards.learned import need_empty
    from ..rewards.registry import KNOWN

    if str(out) in KNOWN:
        raise SettingError(f"--out {out} is the name of a reward that the package has; give another.")
    need_empty(out)
    return out


def classify_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="PATH",
        help="labelled examples: a folder of a folder a class, an .npz, a table",
    )
    add("--target", required=True, metavar="CLASS", help="the wanted class, as the labels name it")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder for the reward")
    add("--labels", metavar="NAME", help="the array or column of the classes [default labels, label]")
    add("--kind", metavar="NAME", help="pictures, vectors or series, where the file does not say")
    add("--size", type=whole(4), metavar="INT", help="of pictures in a folder, pixels a side: the model's own")
    add("--features", default="convolution", metavar="SPEC", help="what it sees: convolution, pixels, values, classifier, "
        "imagenet, or file.py:function [default convolution]")  # fmt: skip
    add("--features-option", action="append", default=[], metavar="NAME=VALUE", help="an option of these features")
    add("--ridge", type=positive, metavar="FLOAT", help="smoothness of the head [default: by cross-validation]")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the folds [default 0]")


def classify(options: argparse.Namespace) -> int:
    """Fit a calibrated classifier and say how good it is."""
    from ..feedback.classify import classify as fit_classes
    from ..report.progress import waiting

    out = new_reward(options.out)
    with waiting("fitting"):
        reward = fit_classes(
            options.data, options.target, out, labels=options.labels or True, kind=options.kind, size=options.size,
            features=options.features, features_options=assignments(options.features_option, "--features-option"),
            ridge=options.ridge, seed=options.seed,
        )  # fmt: skip
    for note in reward.facts["notes"]:
        print(f"note: {note}")
    print("\n".join(said_of_classes(reward)))
    print(
        f"reward     {out}; `scoreact train ... --reward {out} --kl-weight 1`: the law of the samples given {options.target}"
    )
    return 0


def said_of_classes(reward: Any) -> list[str]:
    """What was found, in a few lines."""
    f, target = reward.facts, reward.target
    row = f["by_class"][reward.classes.index(target)]
    chosen = "by cross-validation" if f["ridges"] else "as given"
    return [
        f"AUC        {row['auc']:.3f} ± {row['auc_half_width']:.3f} (95 %): so often a held-out {target} is told from another; "
        f"{100 * row['share']:.0f} % of {f['held_out']:,} are {target}",
        f"off        {row['calibration_error']:.3f}: its probabilities from the shares found, "
        f"{row['calibration_error_before']:.3f} before calibration; reliability.png",
        f"log loss   {f['log_loss']:.3f} nats, {f['log_loss_before']:.3f} before calibration; temperature "
        f"{reward.temperature:.3g}",
        f"ridge      {f['ridge']:.3g}, {chosen}; {len(reward.classes)} classes on {len(reward.mean)} features "
        f"({reward.features.spec}), fitted on {f['fitted_on']:,} examples",
    ]


def fit_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("store", metavar="STORE", help="answers, as `scoreact rate` keeps them: preferences.db")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder for the reward")
    add("--question", metavar="NAME|TEXT", help="whose answers, where several were asked")
    add("--features", action="append", default=[], metavar="SPEC", help="what it may see, the best of them being taken: "
        "convolution, pixels, values, classifier, imagenet, denoiser (of --model), network (trained on the answers), or "
        "file.py:function; may be given several times [default: what suits the samples, the model's, a network]")  # fmt: skip
    add("--model", metavar="RECIPE|RUN_DIR", help="whose pretrained model's own features may be seen too: a recipe, a "
        "pipeline, my_model.py:build, a run. Where they are chosen the reward is for this model alone")  # fmt: skip
    add("--model-option", action="append", default=[], metavar="NAME=VALUE", help="of that recipe or pipeline")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the folds and of a network [default 0]")
    parser.belongs("model_option", "model")


def fit(options: argparse.Namespace) -> int:
    """Fit a reward to answers and say how good it is."""
    import torch

    from ..feedback.evidence import read_evidence
    from ..feedback.liking import fit_reward, write_liked
    from ..report.progress import waiting
    from ..rewards.learned import save_learned

    out = new_reward(options.out)
    evidence = read_evidence(options.store, options.question)
    model = None
    if options.model is not None:
        model = build_policy(source_with(options.model, options.model_option, "--model-option"))[0].reference
    with waiting("fitting"):
        reward = fit_reward(evidence, options.features, torch.Generator().manual_seed(options.seed), model)
        save_learned(reward, out)
        picture = write_liked(reward, evidence, out)
    for note in reward.facts["notes"]:
        print(f"note: {note}")
    print("\n".join(said_of_fit(reward.facts)))
    if picture is not None:
        print(f"picture    {picture}: what it likes most, above, and least, below")
    print(f"reward     {out}; `scoreact train ... --reward {out} --kl-weight 1` believes the odds of one rater")
    return 0


def said_of_fit(facts: Any) -> list[str]:
    """What was found, in a few lines."""
    f = facts
    (best,) = [c for c in f["candidates"] if c["chosen"]]
    found = [
        f"answers    {f['answers']} of {len(f['raters'])} rater{'s' * (len(f['raters']) > 1)} about {f['samples']} samples"
    ]
    if "accuracy" in f:
        low, high = f["accuracy_interval"]
        by = "drawn at random" if f["random"] else "not drawn at random, so that they may flatter it or not"
        found.append(
            f"accuracy   {f['accuracy']:.3f} ({low:.3f} to {high:.3f}): so often the one it prefers won, of {f['judged_by']} "
            f"pairs that were left out of its fit, {by}; 0.5 is chance"
        )
        said = ", ".join(f"{row['said']:.2f} -> {row['came']:.2f}" for row in f["calibration"])
        found.append(f"calibrated probability it gave its favourite -> how often that won: {said}")
    for name, text in (
        ("self_agreement", "a repeated pair got the same answer"),
        ("between_raters", "two raters agreed"),
    ):
        if name in f:
            low, high = f[f"{name}_interval"]
            found.append(f"people     {f[name]:.3f} ({low:.3f} to {high:.3f}): {text}, of {f[name + '_of']} times")
    gain = f["log_likelihood"] - f["without_features"]
    found.append(
        f"features   {_seen(best)}: {gain:.3f} nats an answer better than none, on answers left out of the fit"
    )
    if len(f["candidates"]) > 1:
        found.append("tried      nats an answer better than none, share of winners foretold, both on answers left out")
        for c in f["candidates"]:
            share = "" if c["accuracy"] is None else f"{c['accuracy']:.3f}"
            better = c["log_likelihood"] - c["without_features"]
            found.append(f"           {better:+.3f}  {share:>5}  {_seen(c)}{', taken' if c['chosen'] else ''}")
    if gain <= 0:
        found.append(
            "note: no features foretell the answers better than chance; collect more, or give --features of your own."
        )
    for r in f["raters"]:
        low, high = r["weight_interval"]
        side, (left, right) = r["left_at_equal"], r["left_interval"]
        found.append(
            f"rater      {r['rater'] or 'unnamed'}: {r['answers']} answers, weight {r['weight']:.2f} ({low:.2f} to {high:.2f}; "
            f"the median rater has 1), left of equals {side:.2f} ({left:.2f} to {right:.2f})"
        )
    return found


def _seen(candidate: Any) -> str:
    return f"{candidate['features']}{', by the words of the prompt' if candidate['by_word'] else ''}"
