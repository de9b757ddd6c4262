"""Several adapters on the same frozen denoiser: which one acts is a list of names in each of peft's layers.

Knows a denoiser and peft, which is imported when the first adapter is made. LoRA: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ...support.files import add_to_digest

LOOKED_AT = 4096  # values of a frozen tensor that the digest sees: gigabytes are told apart in seconds


class Adapters:
    """A denoiser and the adapters on it. Those that the pipeline came with are part of the pretrained model."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.layers: list[Any] = []  # peft's, where an adapter can act
        self.adapter_config: Any = None
        self.base_adapters: list[str] = []  # that the pipeline came with: part of the pretrained model
        self._adapter_numbers = itertools.count()

    def add_adapter(self, config: Any = None, like: str | None = None) -> str:
        """A new adapter's name; its output is zero, or that of another one."""
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if config is not None:
            self.adapter_config = config
            found = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
            self.base_adapters = list(found[0].active_adapters) if found else []
        name = f"scoreact_{next(self._adapter_numbers)}"
        before = self.active
        flags = {p: p.requires_grad for p in self.denoiser.parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(copy.deepcopy(self.adapter_config), self.denoiser, name)
        self.layers = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        for p in self.denoiser.parameters():
            p.requires_grad_(flags.get(p, True))  # older versions of peft freeze the other adapters
        for p in self.adapter(name).values():
            p.data = p.data.float()  # beside a bfloat16 network too: Adam's steps would round to nothing
        if like is not None:
            source = self.adapter(like)
            for key, p in self.adapter(name).items():
                p.data.copy_(source[key].data)
            for layer in self.layers:
                if like in layer.scaling:
                    layer.scaling[name] = layer.scaling[like]
        self.active = before if like is not None else [*self.base_adapters, name]
        return name

    def adopt(self, given: str) -> str:
        """An adapter that the pipeline came with as one to train, and no part of the pretrained model any more; its name."""
        name = self.add_adapter(self.denoiser.peft_config[given], like=given)
        self.base_adapters.remove(given)
        self.drop_adapter(given)
        self.active = [*self.base_adapters, name]
        return name

    def drop_adapter(self, name: str) -> None:
        if name in self.active:
            self.active = self.base_adapters
        for layer in self.layers:
            layer.delete_adapter(name)
        self.denoiser.peft_config.pop(name, None)

    def adapter(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters under the names that diffusers stores them with."""
        found = ((key, p) for key, p in self.denoiser.named_parameters() if f".{name}." in key)
        return {key.replace(f".{name}.", "."): p for key, p in found}

    @property
    def active(self) -> list[str]:
        """The adapters that act now."""
        return list(self.layers[0].active_adapters) if self.layers else []

    @active.setter
    def active(self, names: Sequence[str]) -> None:
        for layer in self.layers:
            layer._active_adapter = list(names)  # peft's set_adapter would also thaw and freeze weights

    @contextlib.contextmanager
    def acting(self, names: Sequence[str]) -> Iterator[None]:
        """With these adapters; afterwards with those before."""
        before = self.active
        if before == list(names):
            yield
            return
        self.active = list(names)
        try:
            yield
        finally:
            self.active = before

    def digest(self, modules: Iterable[nn.Module]) -> str:
        """A fingerprint of the pretrained weights in these modules (the denoiser and what else the pipeline uses).

        The adapters made here are left out, so that it is the same before and after training. Of a tensor with more than
        `LOOKED_AT` values that many are looked at, evenly spread: a change of all weights is seen, one of a few may not be.

        Returns:
            sha256 in hexadecimal.
        """
        found = hashlib.sha256()
        for number, module in enumerate(modules):
            tensors = [*module.named_parameters(), *module.named_buffers()]
            kept = {name.replace(".base_layer", ""): p for name, p in tensors if ".scoreact_" not in name}
            for name in sorted(kept):  # an adapter around a layer gives its weights another name and place
                add_to_digest(found, f"{number}.{name}", kept[name], LOOKED_AT)
        return found.hexdigest()
