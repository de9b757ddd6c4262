"""Many prompts on a tiny pipeline: processor seconds and memory to open it, to look embeddings up, and for an iteration.

    python benchmarks/prompts.py                                   # 10,000 prompts, 64 MiB of embeddings in memory
    python benchmarks/prompts.py --count 2000 --memory 1024        # all of them in memory

The pipeline has random weights; an embedding has 77 x 64 numbers (19 KiB), a twelfth of Stable Diffusion 1.5's in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers

import scoreact as sa
from scoreact.recipes.pipeline import build

WIDTH, TOKENS = 64, 77


def pipeline(folder: Path) -> Any:
    """Stable Diffusion's kind, on latents of 8 x 8, with a tokenizer that spells."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    words = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=WIDTH, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=words, unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def resident() -> float:
    """MiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def written(count: int, folder: Path) -> Path:
    """A table of so many different prompts of five to nine words."""
    draw, words = random.Random(0), [f"{a}{b}{c}" for a in "bcdfgm" for b in "aeiou" for c in "lnrst"]
    prompts = {" ".join(draw.choices(words, k=draw.randint(5, 9))): None for _ in range(count + count // 100)}
    path = folder / "prompts.jsonl"
    lines = (json.dumps({"prompt": prompt, "number": i}) for i, prompt in enumerate(list(prompts)[:count]))
    path.write_text("\n".join(lines))
    return path


def main() -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="prompts [default 10000]")
    parser.add_argument("--memory", type=int, default=64, help="prompt_memory in MiB [default 64]")
    parser.add_argument("--batch-size", type=int, default=16, help="paths an iteration [default 16]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = written(options.count, Path(folder))
        pipeline(Path(folder)).save_pretrained(Path(folder) / "pipeline")
        few = Path(folder) / "few.txt"
        few.write_text("a cat\n")
        build(str(Path(folder) / "pipeline"), str(few))  # what is imported and allocated once
        before, begin = resident(), time.process_time()
        problem = build(str(Path(folder) / "pipeline"), str(path), lora_rank=4, prompt_memory=options.memory)
        opened, table = time.process_time() - begin, problem.model.family.table  # type: ignore[attr-defined]
        total = len(table.rows) * table.row_bytes / 2**20
        size = f"{table.row_bytes / 1024:.0f} KiB each, {total:.0f} MiB"
        print(f"{len(table.rows)} prompts, {size}, of which {options.memory} MiB may stay in memory")
        print(
            f"opened and encoded in {opened:.1f} s; {table.on_disk} rows on disk; memory {before:.0f} -> {resident():.0f} MiB"
        )
        rows, begin = torch.randint(len(table.rows), (100, 16)), time.process_time()
        for some in rows:
            table.at(some)
        print(f"16 embeddings anywhere: {10 * (time.process_time() - begin):.2f} ms")
        begin = time.process_time()
        settings = {"batch_size": options.batch_size, "reference_batches": 1, "steps": 4, "heldout_samples": 16}
        sa.finetune(
            problem, lambda images: images.mean((1, 2, 3)), iterations=1, algorithm="ddpo", device="cpu", progress=False,
            **settings,
        )  # fmt: skip
        print(
            f"an iteration and all that is around it: {time.process_time() - begin:.1f} s; memory {resident():.0f} MiB"
        )


if __name__ == "__main__":
    main()
