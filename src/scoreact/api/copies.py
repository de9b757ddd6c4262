"""Whether a run's samples are copies of what its pretrained model learned from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.memorisation import compared, memorisation
from ..feedback.discriminate import examples_like, sample_shape
from ..support.errors import SettingError
from ..support.names import known_name
from ..support.own_data import OwnData

if TYPE_CHECKING:
    from .saved_run import SavedRun


def copies_of(
    run: SavedRun, data: str | Path | OwnData, samples: int, seed: int, weights: str, data_class: str | None
) -> dict[str, dict[str, float]]:
    """How near samples are to the training data, of the pretrained and of the tuned model.

    Args:
        run: whose.
        data: what the pretrained model learned from, as `pretrain` takes it.
        samples: in all; seed: of them. weights: final or best.
        data_class: the tuned model's samples are compared with examples of this class alone.

    Returns:
        {"pretrained": ..., "tuned": ...}, each what `evaluation.memorisation.Memorisation` names.

    Raises:
        SettingError: data of another shape than the samples, an unknown class, too few held-out examples.
    """
    policy = run.policy(weights)
    shape = sample_shape(policy.model)
    found = data if isinstance(data, OwnData) else examples_like(data, shape, data_class is not None)
    if tuple(found.train.values.shape[1:]) != shape:
        raise SettingError(
            f"the data are of shape {tuple(found.train.values.shape[1:])}, and samples of {shape}; give those that the model "
            "learned from."
        )
    learned, heldout = compared(found.train.floats()), compared(found.heldout.floats())
    parts = [(learned, heldout)] * 2
    if data_class is not None:
        row = found.classes.index(known_name(data_class, found.classes, "unknown class"))
        assert found.train.labels is not None
        assert found.heldout.labels is not None
        parts[1] = learned[found.train.labels == row], heldout[found.heldout.labels == row]
    each = -(-samples // len(run.names(None, 1)))
    drawn = [run.draw(policy, None, each, None, None, seed, reference) for reference in (True, False)]
    return {
        name: memorisation(*part, compared(x))._asdict()
        for name, part, x in zip(("pretrained", "tuned"), parts, drawn, strict=True)
    }
