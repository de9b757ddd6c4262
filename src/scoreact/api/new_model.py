"""`sa.pretrain`: a model of the user's own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.network import NetworkModel
from ..report.model_sheet import sheet_of
from ..report.progress import somebody_looks
from ..runs.pretraining import Event, Pretraining, PretrainPlan, can_resume
from ..support.errors import SettingError
from ..support.own_data import OwnData, read_data


def pretrain(
    out: str | Path,
    data: str | Path | OwnData,
    *,
    kind: str | None = None,
    labels: bool | str = False,
    size: int | None = None,
    window: int | None = None,
    values: str = "levels",
    columns: Sequence[str] = (),
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    progress: bool | None = None,
    on_event: Event | None = None,
    **plan: Any,
) -> NetworkModel:
    """Learn a model of your own data: the step before `finetune`.

    A rectified flow is learned by denoising, with a network that suits the data: a UNet for pictures, a residual MLP for
    vectors, a dilated convolutional network for series. What is kept is the average of the weights over the last tenth of the
    steps, at the look whose held-out loss was the lowest.

    Args:
        out: The model's folder, new or empty; afterwards what `scoreact train`, `sample` and `check model` take.
        data: A folder of pictures, an .npz or .npy, a .csv, .tsv or .txt; or what `read_data` made of one.
        kind: pictures, vectors or series, where the file does not say.
        labels: True: learn the classes (the folders' names, the array `labels`, the column `label`), so that each can be asked
            for; a text: the array or column of that name.
        size: Pictures are scaled and cut to a square of so many pixels.
        window: A table's rows are times, and an example is so many of them in a row. values: "levels" or "returns".
        columns: Of a table, those to read, in this order; none: every one that holds numbers.
        minutes: Of training, in this call; 10 where no steps are given either.
        steps: Of training, in all.
        resume: Go on with the model in `out`, with the same data. Without it a folder that holds one is refused.
        progress: Print what happens. Left out: in a terminal and in a notebook.
        on_event: Told (kind, line) of everything that happens.
        plan: Of `runs.pretraining.PretrainPlan`: batch_size, learning_rate, width, label_dropout, flip, bfloat16, seed, device.

    Returns:
        The model, on the device that it was trained on.

    Raises:
        SettingError: For data that cannot be learned from, with the file or row and the remedy, and for unusable settings.
        RunExists: When `out` is in use. RunError: When it cannot be continued. Diverged: When the loss is not finite.
    """
    for name in plan:
        if name not in PretrainPlan.__dataclass_fields__:
            raise SettingError(f"unknown setting {name!r}; known: {', '.join(PretrainPlan.__dataclass_fields__)}.")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise SettingError(f"minutes is {minutes}; give a number above 0.")
    if steps is not None and steps < 1:
        raise SettingError(f"steps is {steps}; give at least 1.")
    source = "" if isinstance(data, OwnData) else str(Path(data).expanduser().resolve())
    if not isinstance(data, OwnData):
        data = read_data(data, kind=kind, labels=labels, size=size, window=window, values=values, columns=columns)
    elif kind or labels or size or window or columns or values != "levels":
        raise SettingError(
            "kind, labels, size, window, values and columns belong to a file; leave them out beside data that are read."
        )
    told = on_event or (lambda kind, line: None)
    if somebody_looks() if progress is None else progress:
        from ..report.pretraining_words import Words

        told = _both(Words(), told)
    folder = Path(out).expanduser()
    if resume and not can_resume(folder):
        raise SettingError(f"{folder} holds no checkpoint of a pretraining; leave resume out.")
    session = Pretraining(
        folder, data, PretrainPlan(**plan) if plan or not resume else None, source=source, sheet=sheet_of(data), on_event=told,
        resume=resume,
    )  # fmt: skip
    return session.run(steps, minutes)


def _both(first: Event, second: Event) -> Event:
    def tell(kind: str, line: Any) -> None:
        first(kind, line)
        second(kind, line)

    return tell
