"""ONNX graphs with a gradient: ONNX's own conformance cases, torch's own gradients, a runtime; and rewards made of them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreact import rewards as rw
from scoreact.cli import main as cli
from scoreact.rewards import onnx_operators
from scoreact.rewards.onnx_graph import OnnxModule
from scoreact.support.errors import RewardError
from scoreact.types import Condition

onnx = pytest.importorskip("onnx")

HALF = ("float16", "bfloat16")  # computed in float32 here
REFUSED = (
    "uses what is not supported", "known are 7 to", "training mode", "of layout 1", "with peepholes",
    "ScatterND with reduction", "no whole number", "non-zero si", "'UInt",
)  # fmt: skip


def plain(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return np.array(array, dtype="float32" if array.dtype.name in HALF else None)


@pytest.fixture(scope="module")
def conformance() -> list[Any]:
    """The node cases of the ONNX project: a graph, inputs and what must come out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def test_every_operator_computes_what_onnx_says(conformance: list[Any]) -> None:
    wrong, refused, seen = [], [], set()
    for case in conformance:
        try:
            module = OnnxModule(case.model)
        except RewardError as error:
            refused.append(str(error))
            continue
        for inputs, outputs in case.data_sets:
            try:
                values = [torch.from_numpy(plain(x)) for x in inputs]
            except TypeError:  # strings, sequences, formats of four bits
                continue
            named = dict(zip([entry.name for entry in case.model.graph.input], values, strict=True))
            try:
                found = list(module(named).values())
            except RewardError as error:
                refused.append(str(error))
                continue
            half = any(np.asarray(x).dtype.name in HALF for x in (*inputs, *outputs))
            near = {"rtol": 2e-2, "atol": 1e-2} if half else {"rtol": case.rtol, "atol": max(case.atol, 1e-5)}
            for ours, theirs in zip((x.numpy() for x in found), map(plain, outputs), strict=True):
                same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
                if not same or not np.allclose(ours, theirs, **near, equal_nan=True):
                    wrong.append(case.name)
            seen |= {node.op_type for node in case.model.graph.node}
    assert wrong == []
    assert [text for text in refused if not any(reason in text for reason in REFUSED)] == []
    assert set(onnx_operators.OPERATORS) - seen == set()  # each of them was looked at


class Everything(nn.Module):
    """Convolutions, pools, norms, resizing, attention and a recurrence: what scorers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.GroupNorm(2, 8), nn.GELU(), nn.AvgPool2d(2, 1, 1),
            nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), nn.Upsample(scale_factor=2, mode="bilinear"),
        )  # fmt: skip
        self.query, self.norm, self.rnn = nn.Linear(8, 24), nn.LayerNorm(8), nn.GRU(8, 8, bidirectional=True)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(self.first(x), size=(5, 6), mode="bicubic").flatten(2).transpose(1, 2)
        q, k, v = self.query(self.norm(h)).chunk(3, -1)
        h = h + (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
        h, _ = self.rnn(h.transpose(0, 1))
        return self.last(h.mean(0))


def exported(network: nn.Module, x: Tensor, **options: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (x,), file, input_names=["x"], output_names=["y"], dynamo=False,
            **{"dynamic_axes": {"x": {0: "batch"}}, **options},
        )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize("opset", [11, 17, 20])
def test_a_network_of_torchs_comes_back_with_its_gradient(opset: int) -> None:
    torch.manual_seed(0)
    network = Everything().eval().requires_grad_(False)
    module = OnnxModule(exported(network, torch.rand(3, 3, 16, 17), opset_version=opset))
    x = torch.rand(2, 3, 16, 17)
    ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    a, b = module({"x": ours})["y"], network(theirs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    a[:, 1].sum().backward()
    b[:, 1].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-8)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(exported(network, x, opset_version=opset), providers=["CPUExecutionProvider"])
    (c,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(a.detach(), torch.from_numpy(c), rtol=1e-4, atol=1e-6)


def test_half_precision_is_widened() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    x = torch.rand(2, 3, 8, 8)
    expected = network(x).detach()
    found = OnnxModule(exported(network.half(), x.half()))({"x": x})["y"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_every_input_is_wanted() -> None:
    module = OnnxModule(exported(nn.Linear(2, 1), torch.rand(3, 2)))
    with pytest.raises(RewardError, match=r"got z. Its inputs: x \[batch, 2\] float32"):
        module({"z": torch.rand(3, 2)})


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    module = OnnxModule(exported(Everything().eval(), torch.rand(3, 3, 16, 17)))
    x = torch.rand(2, 3, 16, 17)
    there, here = x.cuda().requires_grad_(True), x.clone().requires_grad_(True)
    b = module({"x": here})["y"]
    a = module.cuda()({"x": there})["y"]
    torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-3)  # TF32 convolutions
    a.square().sum().backward()
    b.square().sum().backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=2e-2, atol=1e-3)


# --- small graphs by hand --------------------------------------------------------------------------------------------

IMAGES = torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(0))
CONDITION = Condition(["a cat", "a dog", "a cat"])


def graph(
    tmp_path: Path,
    nodes: list[Any],
    shape: list[Any],
    out: list[Any],
    weights: dict[str, Tensor] | None = None,
    domains: tuple[tuple[str, int], ...] = (("", 17),),
    dtype: int = 1,
    outputs: tuple[str, ...] = ("y",),
) -> str:
    h = onnx.helper
    made = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", dtype, shape)],
        [h.make_tensor_value_info(name, 1, out) for name in outputs],
        [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in (weights or {}).items()],
    )  # fmt: skip
    model = h.make_model(made, opset_imports=[h.make_opsetid(*domain) for domain in domains])
    path = tmp_path / "scorer.onnx"
    onnx.save(model, path)
    return str(path)


def mean_by_channel(tmp_path: Path, shape: list[Any], axes: list[int]) -> str:
    """y [b, C]: the mean of each channel."""
    node = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=0)
    return graph(tmp_path, [node], shape, ["b", "c"])


def score(file: str, images: Tensor = IMAGES, **options: Any) -> Tensor:
    return rw.load(f"onnx:{file}", **options)(images, CONDITION)


def test_index_weight_and_transform_choose_the_number(tmp_path: Path) -> None:
    file = mean_by_channel(tmp_path, ["b", 3, "h", "w"], [2, 3])
    means = IMAGES.mean((2, 3))
    torch.testing.assert_close(score(file, index=1, weight=-2), -2 * means[:, 1])
    torch.testing.assert_close(score(file, index=2, transform="log_softmax"), means.log_softmax(1)[:, 2])
    torch.testing.assert_close(score(file, index=0, transform="log"), means[:, 0].log())
    torch.testing.assert_close(score(file, index=0, batch_size=2), means[:, 0])


def test_pictures_are_brought_into_the_graphs_form(tmp_path: Path) -> None:
    last = mean_by_channel(tmp_path, ["b", 4, 4, 3], [1, 2])
    small = F.interpolate(IMAGES, (4, 4), mode="bicubic", antialias=True).mean((2, 3))
    torch.testing.assert_close(score(last, index=0), small[:, 0])
    torch.testing.assert_close(score(last, index=0, channels="bgr", value_range=[0, 255]), 255 * small[:, 2])
    normal = score(last, index=1, value_range=[-1, 1], mean=[0, 0.5, 0], std=[1, 4, 1])
    torch.testing.assert_close(normal, (2 * small[:, 1] - 1 - 0.5) / 4)
    torch.testing.assert_close(score(last, IMAGES[:, :1], index=2), small[:, 0])  # grey pictures, three channels
    grey = mean_by_channel(tmp_path, ["b", 1, "h", "w"], [2, 3])
    torch.testing.assert_close(score(grey), rw.brightness(IMAGES))
    torch.testing.assert_close(
        score(grey, size=3), rw.brightness(F.interpolate(IMAGES, (3, 3), mode="bicubic", antialias=True))
    )


def test_the_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    file = mean_by_channel(tmp_path, ["b", 3, "h", "w"], [2, 3])
    reward = rw.load(f"onnx:{file}", index=1, weight=5)
    assert rw.is_differentiable(reward)
    x = IMAGES.clone().requires_grad_(True)
    reward(x, CONDITION).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, 1], torch.full((3, 6, 8), 5 / 48))
    assert not x.grad[:, 0].any()


def test_a_batch_of_one_in_the_file_is_taken_row_by_row(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3], keepdims=1),
        onnx.helper.make_node("Reshape", ["m", "one"], ["y"]),
    ]
    file = graph(tmp_path, nodes, [1, 3, 6, 8], [1, 1], {"one": torch.tensor([1, 1])})
    torch.testing.assert_close(score(file), IMAGES.mean((1, 2, 3)))
    hidden = graph(tmp_path, nodes, ["b", 3, 6, 8], [1, 1], {"one": torch.tensor([1, -1])})
    with pytest.raises(RewardError, match="batch_size=1"):
        score(hidden)
    torch.testing.assert_close(score(hidden, batch_size=1), IMAGES.mean((1, 2, 3)))


def test_samples_that_are_no_pictures_go_in_as_they_are(tmp_path: Path) -> None:
    file = graph(tmp_path, [onnx.helper.make_node("ReduceL2", ["x"], ["y"], axes=[1], keepdims=0)], ["b", 2], ["b"])
    points = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert score(file, points).tolist() == [5, 0, 1]
    with pytest.raises(RewardError, match=r"no picture"):
        score(file, points, size=3)
    with pytest.raises(RewardError, match=r"samples of shape \(3, 3, 6, 8\) do not fit.*inputs: x \[b, 2\] float32"):
        score(file)


def test_classes_by_name_and_by_prompt(tmp_path: Path) -> None:
    file = mean_by_channel(tmp_path, ["b", 3, "h", "w"], [2, 3])
    names = tmp_path / "classes.txt"
    names.write_text("A cat, tabby\nbird, crane\na dog\n")
    means = IMAGES.mean((2, 3))
    torch.testing.assert_close(score(file, index="tabby", classes=str(names)), means[:, 0])
    torch.testing.assert_close(score(file, index="prompt", classes=str(names)), means[[0, 1, 2], [0, 2, 0]])
    with pytest.raises(RewardError, match=r"class 'tabbi' is none of them. Did you mean 'tabby'"):
        score(file, index="tabbi", classes=str(names))
    names.write_text("a cat, crane\nbird, crane\na dog\n")
    with pytest.raises(RewardError, match="stands for the classes 0, 1; give the number"):
        score(file, index="crane", classes=str(names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"holds 3 numbers a sample; give one as the option index. The file's inputs: x \[b, 3, h, w\] float32"),
        ({"index": 3}, r"index is \[3\]"),
        ({"index": -1}, "whole numbers from 0 on"),
        ({"index": "cat"}, "give the file of the class names as the option classes"),
        ({"index": 0, "classes": "absent.txt"}, "does not exist"),
        ({"index": 0, "output": "z"}, "output is 'z'.*Known: y"),
        ({"index": 0, "transform": "logg"}, "transform is 'logg'. Did you mean 'log'"),
        ({"index": 0, "weight": 0}, "weight is 0"),
        ({"index": 0, "batch_size": 0}, "batch_size is 0"),
        ({"index": 0, "layout": "nhwc"}, "'w' channels|h channels|w channels|samples of shape"),
        ({"index": 0, "layout": "chw"}, "layout is 'chw'; give nchw or nhwc"),
        ({"index": 0, "channels": "gbr"}, "channels is 'gbr'"),
        ({"index": 0, "size": "big"}, "size is 'big'"),
        ({"index": 0, "value_range": [1, 1]}, "value_range is"),
        ({"index": 0, "std": [1, 0, 1]}, "std positive"),
        ({"indx": 0}, "no option 'indx'. Did you mean 'index'"),
    ],
)
def test_wrong_options_are_sentences(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    file = mean_by_channel(tmp_path, ["b", 3, "h", "w"], [2, 3])
    with pytest.raises(ValueError, match=message):
        score(file, **options)


def test_what_a_graph_cannot_be_used_for_is_said_when_it_is_read(tmp_path: Path) -> None:
    h = onnx.helper
    with pytest.raises(RewardError, match="does not exist"):
        rw.load("onnx:absent.onnx")
    (tmp_path / "text.onnx").write_text("no graph at all")
    with pytest.raises(RewardError, match=r"is no ONNX file|holds no ONNX graph"):
        rw.load(f"onnx:{tmp_path}/text.onnx")
    mean = h.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2, 3], keepdims=0)
    four = ["b", 3, 4, 4]
    random = [h.make_node("RandomNormalLike", ["x"], ["z"]), h.make_node("Det", ["z"], ["y"])]
    with pytest.raises(RewardError, match="not supported: Det, RandomNormalLike"):
        rw.load(f"onnx:{graph(tmp_path, random, four, ['b'])}")
    foreign = h.make_node("FusedThing", ["x"], ["y"], domain="com.microsoft")
    with pytest.raises(RewardError, match=r"not supported: com\.microsoft\.FusedThing"):
        rw.load(f"onnx:{graph(tmp_path, [foreign], four, ['b'], domains=(('', 17), ('com.microsoft', 1)))}")
    with pytest.raises(RewardError, match="opset 6; known are 7"):
        rw.load(f"onnx:{graph(tmp_path, [mean], four, ['b'], domains=(('', 6),))}")
    strange = h.make_node("Relu", ["x"], ["y"], slope=1.0)
    with pytest.raises(RewardError, match="Relu with the attribute slope"):
        rw.load(f"onnx:{graph(tmp_path, [strange], four, ['b'])}")
    with pytest.raises(RewardError, match="takes batches of 4 only"):
        rw.load(f"onnx:{graph(tmp_path, [mean], [4, 3, 4, 4], [4])}")
    with pytest.raises(RewardError, match="whole numbers, which have no gradient"):
        rw.load(f"onnx:{graph(tmp_path, [mean], four, ['b'], dtype=2)}")
    with pytest.raises(RewardError, match="several outputs; give one as the option output"):
        rw.load(
            f"onnx:{graph(tmp_path, [mean, h.make_node('Identity', ['y'], ['z'])], four, ['b'], outputs=('y', 'z'))}"
        )
    with pytest.raises(RewardError, match="5 channels as nchw"):
        rw.load(f"onnx:{graph(tmp_path, [mean], ['b', 5, 4, 4], ['b'])}", layout="nchw")
    with pytest.raises(RewardError, match="does not say where the channels are"):
        rw.load(f"onnx:{graph(tmp_path, [mean], ['b', 'c', 'h', 'w'], ['b'])}")
    wide = h.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(RewardError, match=r"node 'y' \(MatMul\) cannot be computed for inputs of shape \[1, 3, 4, 4\]"):
        rw.load(f"onnx:{graph(tmp_path, [wide], four, ['b'], {'w': torch.rand(5, 2)})}", index=[0, 0, 0])


def test_an_output_without_a_gradient_does_not_claim_one(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("ArgMax", ["x"], ["i"], axis=3, keepdims=0),
        onnx.helper.make_node("Cast", ["i"], ["f"], to=1),
        onnx.helper.make_node("ReduceMean", ["f"], ["y"], axes=[1, 2], keepdims=0),
    ]
    reward = rw.load(f"onnx:{graph(tmp_path, nodes, ['b', 3, 6, 8], ['b'])}")
    assert not rw.is_differentiable(reward)
    torch.testing.assert_close(reward(IMAGES, CONDITION), IMAGES.argmax(3).float().mean((1, 2)))


def test_the_command_line_checks_and_trains_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [
        onnx.helper.make_node("ReduceSumSquare", ["x"], ["square"], axes=[1], keepdims=0),
        onnx.helper.make_node("Neg", ["square"], ["y"]),
    ]
    graph(tmp_path, nodes, ["b", 2], ["b"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "reward", "onnx:scorer.onnx", "--option", "weight=0.1", "--gradient"]) == 0
    assert "fine: reward onnx:scorer.onnx" in capsys.readouterr().out
    size = ["--batch-size", "4", "--steps", "2", "--heldout-samples", "4", "--reference-batches", "1"]
    short = ["--reward", "onnx:scorer.onnx", "--algorithm", "draft", "--out", "run", "--iterations", "1", *size]
    assert cli.main(["train", "gaussian", *short]) == 0
    monkeypatch.chdir("/")  # the run knows the file by its full path
    assert cli.main(["resume", str(tmp_path / "run"), "--iterations", "2"]) == 0
