"""Fine-tune a diffusers pipeline to a reward: the lines of gaussian.py on Stable Diffusion, SDXL, SD3, Flux or your own.

python examples/images.py PIPELINE [iterations]     a hub id or a folder with a model_index.json; a real one wants a GPU
"""

import sys

import scoreact as sa
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.models.value_networks import Encoder
from scoreact.rewards import brightness, of_measure

prompts = ["a photo of a cat", "a photo of a street", "a watercolour of a mountain"]

# the pretrained model and a LoRA adapter of rank 16, which is what training changes
model = pipeline_model(sys.argv[1], lora_rank=16, gradient_checkpointing=True, rows_per_call=8)
reward = of_measure(brightness)  # or your own: any function (pictures [B, 3, H, W] in [0, 1], condition) -> [B]


def show(kind: str, metrics: dict[str, float]) -> None:
    if kind == "evaluation":
        numbers = [f"{name} {metrics[name]:.3f}" for name in ("reward/heldout", "policy/kl", "objective/J")]
        print(f"iteration {metrics['iteration']:>3}  {'  '.join(numbers)}")


iterations = int(sys.argv[2]) if len(sys.argv) > 2 else 40
result = sa.finetune(
    model, reward, prompts, iterations=iterations, kl_weight=0.01, learning_rate=1e-4, batch_size=16, minibatch_size=16,
    value_network=lambda: Encoder(model.shape[0], classes=len(prompts)), value_inputs="x_data_hat",
    heldout_samples=24, on_event=show,
)  # fmt: skip
result.policy.model.save("brighter")  # in plain diffusers: pipe.load_lora_weights("brighter")
