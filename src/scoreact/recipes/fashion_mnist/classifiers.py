"""Two small classifiers of Fashion-MNIST: the judge, whose features measure results, and one that a reward may use.

Knows pictures [B, 1, 28, 28] in [0, 1] and ten classes; does not know rewards or diffusion. The judge never enters a
training: what is trained against a network fools that network first. Hence two, of different shape and seed, plain
convolutional networks with batch normalisation (Ioffe & Szegedy 2015). A Frechet distance in the judge's features is
not an "FID", which means Inception features. Train both anew: `scoreact pretrain judge --data PATH`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, pad

from ...support.errors import SettingError
from ...support.files import read_stored, write_tensors
from . import data as fashion_mnist

# what ships: the networks' shapes and the seeds they are trained with
SHIPPED: dict[str, dict[str, object]] = {
    "judge": {"widths": (32, 64, 128), "kernel": 3, "stride": 1, "features": 64, "seed": 1},
    "classifier": {"widths": (32, 64, 128), "kernel": 5, "stride": 2, "features": 96, "seed": 2},
}


class Classifier(nn.Module):
    """Three convolutions, a layer of features, ten logits. Smooth (SiLU), so that a reward may take its gradient.

    widths: channels of the convolutions; kernel, stride: of the first one (stride 2 replaces its pooling).
    """

    def __init__(
        self, widths: Sequence[int] = (32, 64, 128), kernel: int = 3, stride: int = 1, features: int = 64
    ) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "kernel": kernel, "stride": stride, "features": features}
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip([1, *widths[:-1]], widths, strict=True)):
            size, step = (kernel, stride) if i == 0 else (3, 1)
            layers += [nn.Conv2d(before, width, size, step, size // 2, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            if step == 1:
                layers.append(nn.MaxPool2d(2))
        side = 28 // 2 ** len(widths)
        layers += [nn.Flatten(), nn.Linear(widths[-1] * side**2, features), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(features, len(fashion_mnist.CLASSES))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 28, 28] in [0, 1]."""
        logits: Tensor = self.head(self.dropout(self.body(images)))
        return logits

    def features(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """The layer before the logits: images [B, 1, 28, 28] in [0, 1] -> [B, F]. Differentiable in the images."""
        return self._batched(self.body, images, batch_size)

    def log_probs(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """log p(class | image): images [B, 1, 28, 28] in [0, 1] -> [B, 10]. Differentiable in the images."""
        return log_softmax(self._batched(self, images, batch_size), dim=1)

    def _batched(self, function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or not images.is_floating_point():
            raise SettingError(
                f"the judge got {images.dtype} {tuple(images.shape)}; expected float (B, 1, 28, 28) in [0, 1]. "
                "Decode the states first; for uint8 pictures [B, 28, 28]: `images[:, None] / 255`."
            )
        weight = self.head.weight
        return torch.cat([function(part.to(weight.device, weight.dtype)) for part in torch.split(images, batch_size)])


def load_classifier(name: str = "judge", path: str | Path | None = None) -> Classifier:
    """The shipped network (`judge` or `classifier`), or one saved at `path`; frozen, in evaluation mode, on the CPU."""
    if name not in SHIPPED:
        raise SettingError(f"unknown network {name!r}. Known: {', '.join(SHIPPED)}.")
    with resources.as_file(resources.files("scoreact") / "assets" / f"{name}.safetensors") as shipped:
        file = Path(path) if path is not None else shipped
        if not file.exists():
            raise FileNotFoundError(
                f"{file} does not exist. Make it: `scoreact pretrain judge --data PATH --out FOLDER`."
            )
        state, header = read_stored(file)
    network = Classifier(**json.loads(header["config"]))
    network.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    )
    return network.eval().requires_grad_(False)


def save_classifier(network: Classifier, path: Path, metadata: dict[str, str]) -> None:
    """Weights in float16, batch statistics in float32; the shape of the network and `metadata` in the header."""
    state = {
        key: value.half() if value.is_floating_point() and value.ndim > 1 else value
        for key, value in network.state_dict().items()
    }
    write_tensors(path, state, {"config": json.dumps(network.config), **metadata})


def augment(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Each picture moved by up to `shift` pixels each way and mirrored half of the time; [B, 28, 28] -> the same."""
    batch, height, width = images.shape
    padded = pad(images, (shift,) * 4)
    move = torch.randint(0, 2 * shift + 1, (2, batch, 1), generator=generator)
    rows, columns = move[0] + torch.arange(height), move[1] + torch.arange(width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train_classifier(
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 12,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    bfloat16: bool = True,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Fit in place by cross-entropy with AdamW; images uint8 [N, 28, 28], labels int64 [N].

    The learning rate rises over one tenth of the steps and falls to 0 along a cosine; the last weights are kept,
    nothing is selected on test pictures. `on_epoch(epoch, mean training loss)`. Raises FloatingPointError when not
    finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    steps = epochs * (len(images) // batch_size)
    step = 0
    network.train()
    for epoch in range(epochs):
        losses = []
        for index in torch.split(torch.randperm(len(images), generator=generator), batch_size):
            if len(index) < batch_size:
                continue
            rate = min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            batch = augment(images[index], generator)[:, None].float() / 255
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = network(batch)
            loss = cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            raise FloatingPointError(f"training loss is {mean} in epoch {epoch}; lower learning_rate ({learning_rate})")
        if on_epoch is not None:
            on_epoch(epoch, mean)
    network.eval()


def classifier_accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of right answers; images uint8 [N, 28, 28], labels [N]."""
    with torch.no_grad():
        guess = network.log_probs(images[:, None].float() / 255).argmax(1)
    return (guess == labels).double().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the shipped networks and write `judge.safetensors` and `classifier.safetensors`."""
    parser = argparse.ArgumentParser(prog="scoreact pretrain judge", description=main.__doc__)
    parser.add_argument("--data", help="an .npz or a folder with the official files; downloaded when left out")
    parser.add_argument("--out", type=Path, default=Path("src/scoreact/assets"), help="folder for the weights")
    parser.add_argument("--only", choices=list(SHIPPED), help="train this one")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="1 makes the weights repeatable on one machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images, labels = fashion_mnist.load_pictures(options.data, "train")
    test_images, test_labels = fashion_mnist.load_pictures(options.data, "test")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else list(SHIPPED):
        start = time.perf_counter()
        shape = {key: value for key, value in SHIPPED[name].items() if key != "seed"}
        seed = int(str(SHIPPED[name]["seed"]))
        torch.manual_seed(seed)  # initial weights and dropout take torch's global generator
        network = Classifier(**shape)  # type: ignore[arg-type]

        def report(epoch: int, loss: float, name: str = name, start: float = start) -> None:
            print(
                f"{name} epoch {epoch + 1}/{options.epochs} loss {loss:.4f} {time.perf_counter() - start:.0f} s",
                flush=True,
            )

        train_classifier(network, images, labels, epochs=options.epochs, seed=seed, on_epoch=report)
        path = options.out / f"{name}.safetensors"
        save_classifier(network, path, {"seed": str(seed), "epochs": str(options.epochs)})
        stored = load_classifier(name, path)  # the accuracy of what is stored, float16 rounding included
        measured = classifier_accuracy(stored, test_images, test_labels)
        save_classifier(
            network, path, {"seed": str(seed), "epochs": str(options.epochs), "test_accuracy": f"{measured:.4f}"}
        )
        print(
            f"{name}: {measured:.4f} of the test pictures right, {time.perf_counter() - start:.0f} s, {path}",
            flush=True,
        )


if __name__ == "__main__":
    main()
