"""Low-rank adapters on models of one's own: bits of the pretrained model, the merge, copies, whole runs, refusals."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import scoreact as sa
from scoreact.cli import main as cli
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.check import check_model
from scoreact.models.lora import adapter_of
from scoreact.models.network import NetworkModel
from scoreact.models.weights import digest_of, write_back
from scoreact.support.errors import ModelError
from scoreact.types import Condition

SIZES: dict[str, Any] = {
    "iterations": 3, "batch_size": 16, "steps": 3, "reference_batches": 1, "heldout_samples": 8, "minibatch_size": 16,
    "value_steps": 1, "value_first_steps": 2, "value_batch_size": 16, "learning_rate": 1e-2, "device": "cpu", "average": 0.0,
    "checkpoint_every": 1,
}  # fmt: skip


class Net(nn.Module):
    """Every kind of layer: pictures [B, 2, 4, 4] and times -> the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        self.line = nn.Conv1d(6, 6, 3, padding="same")
        self.time = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6))
        self.norm = nn.GroupNorm(2, 6)
        self.solid = nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1))
        self.last = nn.Conv2d(6, 2, 3, padding=1)
        self.register_buffer("scale", torch.ones(2, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.first(x)) + self.time(t[:, None] ** torch.arange(1, 5))[:, :, None, None]
        h = nn.functional.interpolate(self.down(h.sin()), scale_factor=2.0)
        h = h + self.line(h.flatten(2)).unflatten(2, (4, 4))
        h = h + self.solid(h.unsqueeze(2)).squeeze(2)
        output: Tensor = self.last(h.tanh()) * self.scale
        return output


def build() -> tuple[Net, NetworkModel]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Net()
    return network, NetworkModel(network, RectifiedFlow(), prediction.velocity, (2, 4, 4))


def bright(samples: Tensor, condition: Condition) -> Tensor:
    return samples.mean((1, 2, 3))


def states(count: int = 5) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 2, 4, 4, generator=generator)
    return 0.1 + 0.8 * torch.rand(count, generator=generator), x, Condition([""] * count)


@torch.no_grad()
def seen(model: Any) -> Tensor:
    """Its score at states that are always the same."""
    return model.score(*states())


def moved(model: Any, seed: int = 3) -> Any:
    """Its adapters somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_of(model).values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def test_the_pretrained_model_stays_bit_for_bit_and_its_memory_is_shared() -> None:
    network, plain = build()
    digest = digest_of(plain)
    expected = seen(plain)
    model: Any = sa.lora(plain, 4)
    assert isinstance(model, NetworkModel)
    assert torch.equal(seen(model), expected)
    moved(model)
    assert float((seen(model) - expected).abs().max()) > 0.1
    reference = model.reference()
    assert torch.equal(seen(reference), expected)
    assert torch.equal(seen(plain), expected)
    assert digest_of(reference) == digest == digest_of(plain)
    assert type(reference) is NetworkModel
    assert all(p.requires_grad for p in plain.parameters()), "the user's own are as they were"
    mine = {p.data_ptr() for p in network.parameters()}
    for view in (model, reference, copy.deepcopy(model)):
        frozen = {p.data_ptr() for p in view.parameters() if not p.requires_grad}
        assert frozen == mine
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_of(model))


def test_an_adapter_adds_up_times_down() -> None:
    network, plain = build()
    model: Any = moved(sa.lora(plain, 4))
    merged = model.merged().network
    for name in ("time.0", "first", "down", "line", "solid"):
        layer = model.network.get_submodule(name)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = network.get_submodule(name).weight
        expected = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        assert torch.allclose(merged.get_submodule(name).weight, expected, atol=1e-6), name
    error = (seen(model.merged()) - seen(model)).norm() / seen(model).norm()
    assert float(error) < 1e-5
    assert torch.equal(merged.last.weight, network.last.weight), "too small for the rank"


def test_a_copy_has_adapters_of_its_own() -> None:
    model: Any = moved(sa.lora(build()[1], 4))
    twin = copy.deepcopy(model)
    before = seen(model)
    assert torch.equal(seen(twin), before)
    moved(twin, seed=4)
    assert torch.equal(seen(model), before)
    assert not torch.equal(seen(twin), before)
    assert torch.equal(seen(twin.reference()), seen(model.reference()))


@pytest.mark.parametrize("rule", ["ctrl", "draft", "diffusion_nft"])
def test_a_run_keeps_the_adapter_and_writes_it_back(rule: str, tmp_path: Path) -> None:
    network, plain = build()
    torch.manual_seed(0)
    model = sa.lora(plain, 4)
    pretrained = seen(plain)
    config = sa.Config(algorithm=rule)
    given = {k: v for k, v in SIZES.items() if not k.startswith("value") or rule == "ctrl"}
    given = {k: v for k, v in given.items() if k != "minibatch_size"} if rule == "draft" else given
    result = sa.finetune(model, bright, config=config, out=tmp_path / "run", progress=False, **given)
    tuned = seen(result.policy.model)
    assert float((tuned - pretrained).abs().max()) > 1e-3
    assert torch.equal(seen(result.policy.reference), pretrained)
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert set(stored) == set(adapter_of(model))
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "00000003" / "tensors.safetensors")
    assert {name.removeprefix("policy.") for name in checkpoint if name.startswith("policy.")} == set(stored)

    torch.manual_seed(9)  # other first weights: the run's own are in its files
    opened = sa.open_run(tmp_path / "run", sa.lora(build()[1], 4), bright)
    assert torch.equal(opened.sample(count=3), result.sample(count=3))
    assert torch.equal(opened.sample(count=3, reference=True), result.sample(count=3, reference=True))
    assert opened.evaluate(samples=8, solvers=("ode",), steps=(2,))["weights"] == "final"
    mine = build()[0]
    opened.write_back(mine)

    samples = result.sample(count=3)
    for _ in range(2):  # a second time changes nothing
        result.write_back(network)
        for tensors in (network, mine):
            written = seen(NetworkModel(tensors, RectifiedFlow(), prediction.velocity, (2, 4, 4)))
            assert float((written - tuned).norm() / tuned.norm()) < 1e-5
        assert torch.equal(seen(result.policy.reference), pretrained)
        assert torch.equal(result.sample(count=3), samples)
    assert result.write_back() == len(result.policy.model.state_dict())  # type: ignore[union-attr]
    assert torch.equal(seen(model), tuned), "the averaged adapter, in the model that was given"


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    class Cut(sa.Hook):
        def after(self, trainer: Any) -> sa.Stop | None:
            if trainer.iteration == 2:
                raise KeyboardInterrupt
            return None

    def train(folder: str, seed: int, **more: Any) -> sa.Result:
        torch.manual_seed(seed)
        model = sa.lora(build()[1], 4)
        return sa.finetune(model, bright, out=tmp_path / folder, progress=False, **SIZES, **more)

    whole = train("whole", 0)
    with pytest.raises(KeyboardInterrupt):
        train("cut", 0, hooks=[Cut()])
    resumed = train("cut", 7, resume=True)
    for name, p in adapter_of(whole.policy.model).items():  # type: ignore[arg-type]
        assert torch.equal(p, adapter_of(resumed.policy.model)[name]), name  # type: ignore[arg-type]
    assert whole.final == resumed.final


class Attention(nn.Module):
    """Points [B, 8], by PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.block((x * t[:, None]).unsqueeze(1)).squeeze(1)
        return output


def test_inference_sees_the_adapters_of_a_transformer_layer() -> None:
    model: Any = moved(sa.lora(NetworkModel(Attention(), RectifiedFlow(), prediction.velocity, (8,)), 2)).eval()
    t, x, condition = torch.full((3,), 0.5), torch.randn(3, 8), Condition([""] * 3)
    with_gradient = model.score(t, x, condition).detach()
    with torch.no_grad():
        assert torch.allclose(model.score(t, x, condition), with_gradient, atol=1e-6)
    assert not torch.allclose(with_gradient, model.reference().score(t, x, condition), atol=1e-2)
    assert not [name for name in adapter_of(model) if "out_proj" in name]


def test_targets_are_names_or_their_ends() -> None:
    def layers(*targets: str) -> set[str]:
        return {name.rpartition(".lora_")[0] for name in adapter_of(sa.lora(build()[1], 2, list(targets)))}

    assert layers("first", "time.0") == {"network.first", "network.time.0"}
    assert layers("network.time.2") == {"network.time.2"}
    assert layers("0", "down") == {"network.time.0", "network.down"}
    with pytest.raises(ModelError, match="is called 'irst'"):
        layers("irst")
    network, plain = build()
    network.requires_grad_(False)
    everything = sa.lora(plain, 2)
    network.time.requires_grad_(True)
    assert {n.rpartition(".lora_")[0] for n in adapter_of(sa.lora(plain, 2))} == {"network.time.0", "network.time.2"}
    assert len(adapter_of(everything)) == 2 * 7


def test_a_layer_that_is_left_out_stays_so_where_its_name_is_the_end_of_another_s() -> None:
    outer, inner = nn.Module(), nn.Module()
    outer.first, inner.first, outer.network = nn.Linear(8, 8), nn.Linear(8, 1), inner
    model = sa.lora(NetworkModel(outer, RectifiedFlow(), prediction.velocity, (8,)), 4)
    assert {name.rpartition(".lora_")[0] for name in adapter_of(model)} == {"network.first"}


class Own(nn.Conv2d):
    pass


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> Net:
    network = build()[0]
    network.time[2].weight = network.time[2].weight
    network.other = network.time[2]  # type: ignore[assignment]
    return network


def with_layer(layer: nn.Module) -> Net:
    network = build()[0]
    network.first = layer  # type: ignore[assignment]
    return network


@pytest.mark.parametrize(
    ("network", "rank", "targets", "said"),
    [
        (build()[0], 0, None, "rank is 0; adapters need at least 1."),
        (build()[0], 2, ["frist"], "no Linear layer or convolution of NetworkModel is called 'frist'; their names end in: "),
        (build()[0], 2, ["frist"], "Did you mean 'first'?"),
        (build()[0], 2, ["norm"], "is called 'norm'"),
        (build()[0], 2, [], "targets is empty; name layers"),
        (build()[0], 8, ["last"], "layer network.last cannot carry an adapter of rank 8: it has rank 2 at most."),
        (build()[0], 8, None, "can carry an adapter of rank 8: network.first has rank 6 at most; network.down"),
        (nn.GroupNorm(1, 2), 2, None, "of rank 2; train its own weights instead."),
        (tied(), 2, "2", "layer network.time.2 cannot carry an adapter of rank 2: it shares its weight with network.other."),
        (Attention(), 2, "out_proj", "is read by nn.MultiheadAttention past its adapter"),
        (with_layer(nn.Conv2d(2, 6, 3, groups=2)), 2, "first", "it has groups 2, which peft's adapters do not follow."),
        (with_layer(nn.Conv2d(2, 6, 3, dilation=2)), 2, "first", "it has dilation 2,"),
        (with_layer(nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular")), 2, "first", "it has padding_mode circular,"),
        (with_layer(Own(2, 6, 3)), 2, "first", "it is a Own, of which peft makes no adapter."),
        (with_layer(Scaled(2, 6)), 2, "first", "it is a Scaled with a forward of its own"),
        (with_layer(nn.utils.parametrizations.weight_norm(nn.Linear(2, 6))), 2, "first", "computes its weight from others"),
    ],
)  # fmt: skip
def test_what_cannot_carry_adapters_is_said(
    network: nn.Module, rank: int, targets: str | list[str] | None, said: str
) -> None:
    with pytest.raises(ModelError) as error:
        sa.lora(NetworkModel(network, RectifiedFlow(), prediction.velocity, (2, 4, 4)), rank, targets)
    assert said in str(error.value)


def test_what_is_no_plain_model_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    network, plain = build()
    with pytest.raises(ModelError, match=r"lora takes a model with the members of ScoreModel, not Net; NetworkModel\("):
        sa.lora(network)
    with pytest.raises(ModelError, match="LoRANetworkModel has adapters, or another reference of its own, already"):
        sa.lora(sa.lora(plain, 2), 2)
    plain.merged = nn.Linear(1, 1)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="NetworkModel has a `merged` that is no method of the contract; rename it"):
        sa.lora(plain, 2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"low-rank adapters need peft .*; pip install 'scoreact\[lora\]'"):
        sa.lora(build()[1], 2)


def test_the_check_says_which_layers_have_adapters() -> None:
    lines = check_model(sa.lora(build()[1], 4))
    numbers = 4 * (2 * 9 + 6) + 4 * (6 * 9 + 6) * 2 + 4 * (6 * 3 + 6) + 4 * (4 + 6) + 4 * (6 + 6)
    assert (
        f"fine: adapters of rank 4 on 6 layers (2 Conv2d, 1 Conv1d, 2 Linear, 1 Conv3d): {numbers:,} numbers to train beside "
        f"{sum(p.numel() for p in Net().parameters()):,} frozen ones."
    ) in lines
    assert "note: no adapter on network.last." in lines
    assert "fine: has `merged()`: adapters written back into your own plain network." in lines
    assert "fine: a copy has the same score and weights of its own." in lines


def test_adapters_that_do_not_fit_a_network_are_said() -> None:
    _, plain = build()
    model = sa.lora(plain, 2)
    with pytest.raises(ModelError, match="Linear is no part of the model that was tuned"):
        write_back(model, model, nn.Linear(3, 5))
    assert write_back(moved(model), model, plain) == len(plain.state_dict())
    assert torch.allclose(seen(plain), seen(model), rtol=1e-4, atol=1e-5)


MODEL = """
import torch
import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.mlp import MLP

def build(width=8):
    torch.manual_seed(0)
    return sa.NetworkModel(MLP(2, 2, width), RectifiedFlow(), prediction.velocity, (2,))

def own(lora_rank=3):
    assert lora_rank == 5
    return build()

def left(x):
    return -x[:, 0]
"""
SMALL = ["--iterations", "2", "--batch-size", "16", "--steps", "3", "--value-steps", "1", "--value-first-steps", "2",
         "--value-batch-size", "16", "--reference-batches", "1", "--heldout-samples", "8", "--minibatch-size", "32",
         "--device", "cpu"]  # fmt: skip


def test_the_command_line_puts_adapters_on_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    chosen = ["--option", "lora_rank=4"]
    cli.main(["check", "model", "my_model.py:build", *chosen])
    assert "fine: adapters of rank 4 on " in capsys.readouterr().out
    words = ["--reward", "my_model.py:left", *SMALL, "--out", "run"]
    assert cli.main(["train", "my_model.py:build", *words, "--option", "lora_targets=layers"]) == 2
    assert "option lora_targets is " in capsys.readouterr().err
    assert cli.main(["train", "my_model.py:build", *words, *chosen]) == 0
    for command in (["sample", "run", "--count", "2"], ["report", "run"], ["check", "run", "run"]):
        assert cli.main(command) == 0, command
    assert cli.main(["resume", "run", "--iterations", "3"]) == 0
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert stored
    assert all(".lora_" in name for name in stored)
    assert "low-rank adapters of rank 4" in (tmp_path / "run" / "report.html").read_text()
    words = ["--reward", "my_model.py:left", *SMALL, "--out", "other", "--option", "lora_rank=5"]
    assert cli.main(["train", "my_model.py:own", *words]) == 0, "an option of the function's own is the function's"
