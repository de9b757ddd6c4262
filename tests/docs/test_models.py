"""The three models of docs/models.md, trained, tuned and written back as they stand there; its tables name what exists."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import scoreact as sa
from scoreact.models import base
from scoreact.models.check import OPTIONAL, check_model
from scoreact.models.weights import write_back

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### (.*?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
LAST = "result.write_back(network)"


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs(title: str, code: str) -> None:
    before, after = code.split(LAST)
    space: dict[str, Any] = {"__name__": "example"}
    parts = before.split("result = sa.finetune")
    with torch.random.fork_rng():
        exec(compile(parts[0], title, "exec"), space)
        pretrained = copy.deepcopy(space["network"])
        found = check_model(space["model"])
        assert not [line for line in found if line.startswith("problem")], found
        exec(compile("result = sa.finetune" + parts[1], title, "exec"), space)
    result, network, model = space["result"], space["network"], space["model"]
    if hasattr(sa.Result, "write_back"):
        exec(compile(LAST + after, title, "exec"), space)
    else:
        write_back(result.policy.model, model, network)
    at_start = next(line for line in result.history if "evaluation" in line)
    gained = result.final["reward/heldout"] - at_start["reward/heldout"]
    assert gained > 0.1, (gained, result.final, at_start)
    assert result.final["objective/recovered"] > 0.3
    tuned = result.policy.model.network
    tuned = getattr(tuned, "network", tuned)  # inside IntegerSteps
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[name]), name
    assert any(not torch.equal(tensor, pretrained.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_adapters_tune_the_last_example() -> None:
    (code,) = re.findall(r"^## Low-rank adapters\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    space: dict[str, Any] = {"__name__": "example"}
    with torch.random.fork_rng():
        exec(compile(EXAMPLES[-1][1].split("result = sa.finetune")[0] + code, "adapters", "exec"), space)
    assert space["result"].final["objective/recovered"] > 0.3
    written, tuned = space["model"], space["result"].policy.model
    x, t, condition = torch.randn(8, 2), torch.full((8,), 0.5), written.condition(["left"] * 8)
    error = (written.score(t, x, condition) - tuned.score(t, x, condition)).norm()
    assert float(error.detach()) < 1e-4


def test_there_are_three_examples() -> None:
    assert [title for title, _ in EXAMPLES] == [
        "A DDPM of your own, with integer steps", "An unconditional flow", "A class-conditional one",
    ]  # fmt: skip


def test_the_table_of_optional_members_is_the_contracts() -> None:
    rows = dict(re.findall(r"^\| `(\w+).*?\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert rows == {re.match(r"\w+", member)[0]: protocol.__name__ for protocol, member, _ in OPTIONAL}  # type: ignore[index]
    assert all(hasattr(base, protocol) for protocol in rows.values())
