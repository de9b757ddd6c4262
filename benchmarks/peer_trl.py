"""One run of TRL 0.23.1's DDPOTrainer or AlignPropTrainer on a folder of `text_to_image.py`; prints one JSON line.

Runs in an environment of its own (TRL dropped both trainers in 0.24):
    python -m venv peer && peer/bin/pip install torch==2.13.0
    peer/bin/pip install trl==0.23.1 transformers==4.57.1 diffusers==0.35.2 peft==0.18.1 accelerate==1.11.0 datasets==5.0.1
`trl_side_by_side.py` starts it with the run's settings as JSON. Nothing of TRL is changed; what it needs on a CPU is
said beside each line.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import sys
import tempfile
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import PartialState
from text_to_image import captions_of, reward
from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(run: dict[str, Any]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    PartialState(cpu=True)  # the pipeline logs before the trainer's Accelerator exists, and raises otherwise
    score, known = functools.partial(reward, folder=run["folder"]), captions_of(run["folder"])
    rewards: list[float] = []
    cpu: list[float] = []

    def scored(images: torch.Tensor, prompts: tuple[str, ...], metadata: Any) -> Any:
        found = score(images.float(), prompts)
        rewards.append(float(found.detach().mean()))
        return (found, {}) if run["trainer"] == "alignprop" else (found.detach(), [{}] * len(found))

    work = tempfile.mkdtemp()
    common = {
        "num_epochs": run["epochs"], "seed": run["seed"], "logdir": work, "project_kwargs": {"project_dir": work},
        "accelerator_kwargs": {"cpu": True}, "mixed_precision": "no", "allow_tf32": False, "save_freq": 10**6,
        "sample_num_steps": run["steps"], "sample_guidance_scale": run["guidance"],
        "train_learning_rate": run["learning_rate"], "train_batch_size": run["minibatch"],
    }  # fmt: skip
    kind: Any
    if run["trainer"] == "ddpo":
        kind, config = DDPOTrainer, DDPOConfig(
            **common, sample_batch_size=run["samples"], sample_num_batches_per_epoch=1, per_prompt_stat_tracking=True,
            per_prompt_stat_tracking_buffer_size=32, per_prompt_stat_tracking_min_count=16,
            train_clip_range=run["clip_range"],
        )  # fmt: skip
    else:  # AlignProp's batch is drawn in minibatches, whose gradients are accumulated
        kind, config = AlignPropTrainer, AlignPropConfig(
            **common, train_gradient_accumulation_steps=run["samples"] // run["minibatch"],
            truncated_backprop_rand=False, truncated_backprop_timestep=0,
        )  # fmt: skip
    random.seed(run["seed"])
    pipeline = DefaultDDPOStableDiffusionPipeline(run["folder"], use_lora=True)
    trainer = kind(config, scored, lambda: (random.choice(known), {}), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def heldout() -> float:
        """Mean reward of pictures from noise that no training sees, drawn as training draws them."""
        captions = [known[i % len(known)] for i in range(run["heldout"])]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20_000_003)
            images = trainer.sd_pipeline(
                prompt=captions, num_inference_steps=run["steps"], guidance_scale=run["guidance"], eta=1.0,
                output_type="pt",
            ).images  # fmt: skip
        return float(score(images.float(), captions).mean())

    looks = [(0.0, heldout())] if run.get("look") else []
    step, begin = trainer.step, cpu_seconds()

    def timed(epoch: int, global_step: int) -> int:  # only a stopwatch round the public method
        nonlocal begin
        done: int = step(epoch, global_step)
        cpu.append(cpu_seconds() - begin)
        if run.get("look") and (epoch + 1) % run["look"] == 0:
            looks.append((cpu[-1], heldout()))
            begin = cpu_seconds() - cpu[-1]  # looking is not training
        return done

    trainer.step = timed
    trainer.train()
    if run.get("save"):  # the adapter, for who wants to know its path KL
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        tuned = trainer.sd_pipeline.sd_pipeline
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(tuned.unet))
        tuned.save_lora_weights(run["save"], unet_lora_layers=layers)
    calls = len(rewards) // run["epochs"]  # of the reward, an epoch
    means = [sum(rewards[i : i + calls]) / calls for i in range(0, len(rewards), calls)]
    return {"rewards": means, "cpu": cpu, "cpu_before": 0.0, "looks": looks}


if __name__ == "__main__":
    found = main(json.loads(sys.argv[1]))
    found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))
