"""What a pipeline's value costs at the size of Stable Diffusion: its gradient through the VAE, and through a ridge decoder.

    python benchmarks/decoders.py                  # Stable Diffusion 1.5's shape, random weights: 9 GB, ten CPU minutes
    python benchmarks/decoders.py --tiny           # seconds

One picture, without guidance: a pass of the denoiser, decoding by the VAE and by `control/ridge_decoder.py`, and the gradient
of the surrogate's value at one state with each. CPU seconds (GPU: of the wall), after one that counts not.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gpu import PROMPTS, brightness, opened, seconds, table

from scoreact.control.policy import Policy
from scoreact.training.assembly import build_surrogate, build_value
from scoreact.training.config import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("sd15", "sdxl", "sd35"), default="sd15")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    options.checkpointing, options.rows, device = False, 1, options.device
    model = opened(options, "float32", 1.0, 1, "float32")
    condition, policy = model.condition(PROMPTS[:1]), Policy(model)
    generator = torch.Generator(device).manual_seed(0)
    x, t = model.prior(condition, generator), torch.full((1,), 0.5, device=device)
    rows, found = [], {}
    with torch.no_grad():
        found["a pass of the denoiser"] = seconds(lambda: policy.reference_score(t, x, condition), device, 1)
    for decoder in ("full", "ridge"):
        config = Config(
            algorithm="ctrl_pathwise", value="surrogate", surrogate_decoder=decoder, surrogate_prompts=False
        )
        surrogate = build_surrogate(config, model, PROMPTS)
        assert surrogate is not None
        sde = config.sde(model.schedule)
        value = build_value(config, policy, sde, None, brightness, PROMPTS, surrogate)
        with torch.no_grad():
            if surrogate.decoder is not None:
                pictures = model.decode(x)
                fit = surrogate.decoder.fit
                found["fitting the ridge decoder to a picture"] = seconds(lambda: fit(x, pictures), device, 1)  # noqa: B023
            samples = torch.cat([surrogate.sees(x * scale, model.decode) for scale in (1.0, 0.5)])
            two = model.condition(PROMPTS[:1] * 2)
            surrogate.add(samples, two, brightness(samples, two))
            surrogate.fit()
            name = "decoding by the VAE" if decoder == "full" else "decoding by the ridge decoder"
            small = surrogate.decoder
            found[name] = seconds(lambda: model.decode(x) if small is None else small(x), device, 1)  # noqa: B023
        found[f"gradient of the value, {decoder}"] = seconds(lambda: value.gradient(t, x, condition), device, 1)  # noqa: B023
    rows = [[name, f"{spent:.3g}", f"{spent / found['a pass of the denoiser']:.2g}"] for name, spent in found.items()]
    print(table(["one picture", "seconds", "passes of the denoiser"], rows))


if __name__ == "__main__":
    main()
