"""What the library adds to the bare network: a full-size pipeline with random weights on a GPU, or a tiny one anywhere.

    python benchmarks/gpu.py                              # Stable Diffusion 1.5's shape, bfloat16, LoRA: CUDA
    python benchmarks/gpu.py --shape sd35 --batches 8 16  # Stable Diffusion 3.5 medium's shape
    python benchmarks/gpu.py --compile                    # the same with torch.compile
    python benchmarks/gpu.py --precision                  # only: what rounding costs in path KL, a dtype and guidance
    python benchmarks/gpu.py --tiny                       # a minute on a CPU: that every line of it runs
    python benchmarks/gpu.py --all                        # eight minutes: tests and all shapes, into benchmarks/gpu/
    python benchmarks/gpu.py --all --tiny                 # the same on a CPU, tiny

Rollout: pictures a second, and the share of what the bare calls of denoiser and decoder on the same batches reach (wanted:
0.95). Iteration: seconds of one whole iteration of a rule, and how much more that is than the sum of its network passes, each
kind timed alone at its own number of rows (wanted: 5 %). Memory: peak of that iteration. Path KL by rounding: of four pictures.
Weights are random: speed does not depend on them, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers
from torch import Tensor

from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.training.config import Config, updated, usable
from scoreact.training.rounding import rounding_kl
from scoreact.training.trainer import Trainer
from scoreact.types import Condition

PROMPTS = ["a cat", "two dogs"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- pipelines from configs ------------------------------------------------------------------------------------------


def tokenizer(length: int) -> Any:
    """One that spells: a token a letter. Text costs nothing here, its embedding is computed once a prompt."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def clip(words: Any, kind: str, width: int, heads: int) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=1, projection_dim=width,
        num_attention_heads=heads, max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def vae(widths: tuple[int, ...], layers: int, channels: int, side: int, **config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=layers, latent_channels=channels, sample_size=side,
        norm_num_groups=min(32, widths[0] // 2), down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), **config,
    )  # fmt: skip


def sd15_scheduler() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def sd15(tiny: bool) -> Any:
    words = tokenizer(16 if tiny else 77)
    small: dict[str, Any] = dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    full: dict[str, Any] = dict(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    )  # the rest is the default
    return diffusers.StableDiffusionPipeline(
        vae=vae((8, 16), 1, 4, 16) if tiny else vae((128, 256, 512, 512), 2, 4, 512),
        text_encoder=clip(words, "CLIPTextModel", 16 if tiny else 768, 2 if tiny else 12), tokenizer=words,
        unet=diffusers.UNet2DConditionModel(**(small if tiny else full)), scheduler=sd15_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd35(tiny: bool) -> Any:
    words, (one, two) = tokenizer(16 if tiny else 77), (16, 16) if tiny else (768, 1280)
    small: dict[str, Any] = dict(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    full: dict[str, Any] = dict(
        sample_size=128, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    encoders = [clip(words, "CLIPTextModelWithProjection", width, 2 if tiny else width // 64) for width in (one, two)]
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(patch_size=2, **(small if tiny else full)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=encoders[0], tokenizer=words,
        vae=vae((8, 16), 1, 4, 16) if tiny else vae((128, 256, 512, 512), 2, 16, 1024), text_encoder_2=encoders[1],
        tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def sdxl(tiny: bool) -> Any:
    words = tokenizer(16 if tiny else 77)
    one, two = (16, 16) if tiny else (768, 1280)
    small: dict[str, Any] = dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    full: dict[str, Any] = dict(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae((8, 16), 1, 4, 16) if tiny else vae((128, 256, 512, 512), 2, 4, 1024),
        text_encoder=clip(words, "CLIPTextModel", one, 2 if tiny else 12), tokenizer=words, tokenizer_2=words,
        text_encoder_2=clip(words, "CLIPTextModelWithProjection", two, 2 if tiny else 20),
        unet=diffusers.UNet2DConditionModel(addition_embed_type="text_time", **(small if tiny else full)),
        scheduler=sd15_scheduler(), add_watermarker=False,
    )  # fmt: skip


def opened(options: argparse.Namespace, dtype: str, guidance: float, batch: int, compute: str) -> PipelineModel:
    torch.manual_seed(0)
    with torch.device(options.device):  # where billions of random numbers take seconds
        pipeline = {"sd15": sd15, "sdxl": sdxl, "sd35": sd35}[options.shape](options.tiny)
    pipeline.to(dtype=DTYPES[dtype])
    model = pipeline_model(
        pipeline, compute_dtype=DTYPES[compute], lora_rank=16, guidance_scale=guidance, vae_slicing=False,
        gradient_checkpointing=options.checkpointing, rows_per_call=min(options.rows, batch),
        max_sequence_length=16 if options.tiny and options.shape == "sd35" else None,
    )  # fmt: skip
    return model.to(options.device)


# --- measuring ---------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """The quickest of some runs, after one that counts not; of the processor on a CPU, which other work cannot spoil."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    found = []
    for _ in range(repeats + 1):
        _wait(device)
        begin = clock()
        run()
        _wait(device)
        found.append(clock() - begin)
    return min(found[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float:
    """GiB: of the GPU since it was last asked to forget; of the process, ever, on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


Call = tuple[int, str, bool]  # rows, network, whether a graph is kept


@contextmanager
def counted(model: PipelineModel) -> Iterator[Counter[Call]]:
    """The passes of denoiser and decoder made meanwhile."""
    found: Counter[Call] = Counter()
    family = model.family
    call, decode = family.call, family.decode

    def counting_call(network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        found[len(x), "denoiser", torch.is_grad_enabled()] += 1
        return call(network, timestep, x, prompt)

    def counting_decode(x: Tensor) -> Tensor:
        found[len(x), "decoder", False] += 1
        return decode(x)

    family.call, family.decode = counting_call, counting_decode  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del family.call, family.decode


def bare(model: PipelineModel, kind: Call, device: str) -> float:
    """Seconds of one such pass and nothing else."""
    rows, network, graph = kind
    family = model.family
    x = torch.randn(rows, *family.shape, device=device)
    if network == "decoder":
        with torch.no_grad():
            return seconds(lambda: family.decode(x), device)
    dtype = family.compute_dtype
    prompt = family.table.at(torch.zeros(rows, dtype=torch.long, device=device))
    prompt = {name: row.to(dtype) for name, row in prompt.items()}
    t = torch.full((rows,), 500.0, device=device)
    state = x.to(dtype)

    def forward() -> Tensor:
        with model._acting(), family.computing():
            return family.call(family.denoiser, t, state, prompt)

    if not graph:
        with torch.no_grad():
            return seconds(forward, device)
    found = seconds(lambda: forward().float().square().mean().backward(), device)
    for p in model.parameters():
        p.grad = None
    return found


def measure(options: argparse.Namespace, batch: int) -> list[str]:
    """One line of the table."""
    device, steps = options.device, options.steps
    model = opened(options, options.dtype, options.guidance, batch, options.compute)
    if options.compile:
        model.family.denoiser.compile()
    condition = model.condition((PROMPTS * batch)[:batch])
    policy, sde, ts = Policy(model), SDE(model.schedule, noise_level(1.0)), model.scheduler_times(steps)
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> None:
        path = rollout(policy, sde, ddim, ts, condition, generator, with_reference=False)
        with torch.no_grad():
            model.decode(path.xs[-1])

    floor = rounding_of(model, min(batch, 4), steps, device)
    ours = seconds(draw, device)
    with counted(model) as calls:
        draw()
    plain = sum(number * bare(model, kind, device) for kind, number in calls.items())

    settings = dict(
        algorithm=options.algorithm, iterations=100, batch_size=batch, steps=steps, minibatch_size=min(options.rows, batch),
        accumulate=steps, epochs=1, reference_batches=1, kl_states=min(options.rows, batch), learning_rate=1e-5,
        value_inputs="x_data_hat", value_batch_size=64, heldout_samples=2, guard="off", device=device,
    )  # fmt: skip
    config = updated(Config(), usable(Config(), settings))
    trainer = Trainer(model, brightness, PROMPTS, model.feature_value, config)
    trainer.look_at_reference()
    trainer.iterate()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    iteration = seconds(trainer.iterate, device, 2)
    memory = peak(device)
    with counted(model) as calls:
        trainer.iterate()
    passes = sum(number * bare(model, kind, device) for kind, number in calls.items())
    return [
        f"{batch}", f"{batch / ours:.3g}", f"{plain / ours:.3f}", f"{iteration:.3g}", f"{iteration / passes - 1:+.1%}",
        f"{memory:.2f}", f"{floor:.2g}",
    ]  # fmt: skip


def brightness(samples: Tensor, condition: Condition) -> Tensor:
    return samples.flatten(1).mean(1)


def rounding_of(model: PipelineModel, batch: int, steps: int, device: str) -> float:
    """Path KL of rounding alone, nats."""
    sde, ts = SDE(model.schedule, noise_level(1.0)), model.scheduler_times(steps)
    generator = torch.Generator(device).manual_seed(0)
    return rounding_kl(
        Policy(model), sde, ddim, ts, model.condition((PROMPTS * batch)[:batch]), generator, 1e-4
    )  # fmt: skip


WAYS = [  # dtype of the weights, and of the computing
    ("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32"),
]  # fmt: skip


def precision(options: argparse.Namespace, dtype: str | None) -> str:
    """A table of the path KL of rounding alone, nats; all ways at two guidances, or those of one dtype at one."""
    ways = [way for way in WAYS if dtype in (None, way[0])]
    guidances = [1.0, options.guidance] if dtype is None else [options.guidance]
    batch, rows = (options.batches or [8])[0], []
    for stored, compute in ways:
        row = [stored, compute]
        for guidance in guidances:
            model = opened(options, stored, guidance, batch, compute)
            begin = time.process_time()
            row.append(f"{rounding_of(model, batch, options.steps, options.device):.2g}")
            row.append(f"{time.process_time() - begin:.3g}")
            del model
        rows.append([*row, f"{peak(options.device):.2f}"])
        print(rows[-1], flush=True)
    measured = [name for g in guidances for name in (f"path KL, guidance {g:g}", "seconds")]
    return table(["weights", "computed in", *measured, "peak so far, GiB"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- everything, for a GPU that is there for minutes ---------------------------------------------------------------------


def everything(options: argparse.Namespace) -> None:
    """Each part a process of its own, what it prints appended to the file when it ends: a cut leaves all before it."""
    here, tiny = Path(__file__).parent, ["--tiny"] if options.tiny else []
    gpu, tests = [sys.executable, str(Path(__file__)), "--steps", "4", *tiny], str(here.parent / "tests")
    few = ["--batches", "4" if options.tiny else "8"]
    parts = [
        # a machine that is lent may lack what other tests import
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors",
         *(["--collect-only"] if options.tiny else []), tests],
        [*gpu, "--dtype", "bfloat16", *few],
        [*gpu, "--dtype", "bfloat16", "--compute", "bfloat16", *few],
        [*gpu, "--dtype", "float16", *few],
        *([] if options.tiny else [[*gpu, "--dtype", "float16", "--compute", "float16", *few]]),  # an age on a CPU
        [*gpu, "--shape", "sdxl", "--dtype", "bfloat16", "--checkpointing", "--batches", "4", "--rows", "4"],
        [*gpu, "--shape", "sd35", "--dtype", "bfloat16", "--checkpointing", "--batches", "4", "--rows", "4"],
    ]  # fmt: skip
    if options.tiny or options.faces:
        where = ["--tiny"] if options.tiny else [options.faces, "--device", "cuda", *FACES]
        for number, settings in enumerate(OF_FACES):
            picture = ["--picture", str(options.out / f"faces-{number}.png")]
            parts.append([sys.executable, str(here / "faces.py"), "train", *where, *picture, *settings])
    if options.only:
        parts = [part for part in parts if any(options.only in Path(word).name for word in part)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}{'-tiny' if options.tiny else ''}.md"
    begin = time.perf_counter()
    for part in parts:
        left = options.seconds - (time.perf_counter() - begin)
        text = ended(part, left) if left > 0 else "cut: the time was over"
        shown = " ".join(Path(word).name if "/" in word else word for word in part[1:])
        with path.open("a") as file:
            file.write(f"## {shown}\n\n{text}\n\n{time.perf_counter() - begin:.0f} s so far\n\n")
        print(f"{time.perf_counter() - begin:4.0f} s  {shown}", flush=True)
    print(path)


FACES = ["--rows", "32", "--each", "64"] + [
    word
    for setting in ("batch_size=32", "minibatch_size=32", "iterations=40", "evaluate_every=20", "heldout_samples=64",
                    "reference_batches=4", "kl_weight=0.2")
    for word in ("--setting", setting)
]  # fmt: skip
OF_FACES: list[list[str]] = [  # a black box, then with the reward's gradient
    ["--setting", "algorithm=ctrl_pathwise", "--setting", "value=surrogate", "--setting", "kl_states=64",
     "--setting", "max_kl=0.5", "--setting", "learning_rate=0.0003"],
    [],
]  # fmt: skip


def ended(command: list[str], seconds: float) -> str:
    """What a command printed until it ended or was cut, and how it ended."""
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            end = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            end = f"cut after {seconds:.0f} s"
        file.seek(0)
        lines = [line for line in file.read().splitlines() if not any(word in line for word in NOISE)]
    return "\n".join([*lines[-60:], "", end])


NOISE = ("deprecat", "should be kept in float32", "Loading", "torchvision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("sd15", "sdxl", "sd35"), default="sd15")
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline of that shape, on the CPU in float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cuda; tiny: cpu]")
    parser.add_argument("--batches", type=int, nargs="+", help="pictures a rollout [8 16 32 64; tiny: 4 8]")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8, help="rows of a call of the denoiser and of a minibatch")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights [bfloat16; tiny: float32]")
    parser.add_argument("--compute", choices=tuple(DTYPES), default="float32", help="dtype of the denoiser's passes")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--algorithm", default="ddpo", help="the rule of the iteration")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--precision", action="store_true", help="only the path KL of rounding")
    parser.add_argument(
        "--all", action="store_true", help="the tests marked gpu, then every shape, one part after another"
    )
    parser.add_argument("--seconds", type=float, default=470, help="of --all: what is not done by then is cut [470]")
    parser.add_argument("--faces", default="", help="of --all: weights for benchmarks/faces.py")
    parser.add_argument("--only", default="", help="of --all: the parts with this word in their command")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gpu", help="of --all: where its file goes")
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny runs anywhere.")
    if options.all:
        everything(options)
        return
    dtype = options.dtype
    options.dtype = dtype or ("float32" if options.tiny else "bfloat16")
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.shape}{' (tiny)' if options.tiny else ''}, {name}, torch {torch.__version__}, {options.steps} steps"
    )
    if options.precision:
        print(precision(options, dtype))
        return
    print(
        f"{options.dtype} computed in {options.compute}, guidance {options.guidance:g}, {options.algorithm}, "
        f"{options.rows} rows a call, compile {'on' if options.compile else 'off'}, "
        f"checkpointing {'on' if options.checkpointing else 'off'}"
    )
    rows = []
    for batch in options.batches or ((4, 8) if options.tiny else (8, 16, 32, 64)):
        try:
            rows.append(measure(options, batch))
        except torch.OutOfMemoryError:
            rows.append([f"{batch}", *itertools.repeat("out of memory", 6)])
    head = [
        "batch",
        "pictures/s",
        "of the bare calls",
        "iteration, s",
        "over its passes",
        "peak, GiB",
        "KL by rounding",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
