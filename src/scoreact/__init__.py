"""scoreact: fine-tune diffusion and flow models to a reward by continuous-time RL, the score being the action.

    import scoreact as sa
    result = sa.finetune(model, reward, prompts, iterations=40, out="runs/mine")
    run = sa.open_run("runs/mine")

The equation and the objects are in the modules' own words: dynamics, models, control, algorithms, training, runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .support.errors import (
    Diverged as Diverged,
)
from .support.errors import (
    LoadError as LoadError,
)
from .support.errors import (
    ModelError as ModelError,
)
from .support.errors import (
    RewardError as RewardError,
)
from .support.errors import (
    RunError as RunError,
)
from .support.errors import (
    RunExists as RunExists,
)
from .support.errors import (
    ScoreactError as ScoreactError,
)
from .support.errors import (
    SettingError as SettingError,
)
from .training.config import Config as Config

if TYPE_CHECKING:
    from .api.calibrate import calibrate as calibrate
    from .api.detector import DiffusionDetector as DiffusionDetector
    from .api.detector import score as score
    from .api.new_model import pretrain as pretrain
    from .api.result import Result as Result
    from .api.saved_run import SavedRun as SavedRun
    from .api.saved_run import open_run as open_run
    from .api.start import finetune as finetune
    from .evaluation.grid_search import search_grid as search_grid
    from .feedback.classify import classify as classify
    from .feedback.discriminate import discriminate as discriminate
    from .models.base import ScoreModel as ScoreModel
    from .models.lora import lora as lora
    from .models.network import NetworkModel as NetworkModel
    from .recipes.base import Problem as Problem
    from .recipes.prompts import read_prompts as read_prompts
    from .rewards.registry import load as load_reward  # noqa: F401  for the type checker
    from .training.loop import Hook as Hook
    from .training.loop import Stop as Stop

__version__ = "0.2.0"

# on first use: torch takes seconds to import, and `scoreact --help` needs none of it
_LATER = {
    "DiffusionDetector": ("api.detector", "DiffusionDetector"),
    "Hook": ("training.loop", "Hook"),
    "NetworkModel": ("models.network", "NetworkModel"),
    "Problem": ("recipes.base", "Problem"),
    "Result": ("api.result", "Result"),
    "SavedRun": ("api.saved_run", "SavedRun"),
    "ScoreModel": ("models.base", "ScoreModel"),
    "Stop": ("training.loop", "Stop"),
    "classify": ("feedback.classify", "classify"),
    "calibrate": ("api.calibrate", "calibrate"),
    "discriminate": ("feedback.discriminate", "discriminate"),
    "finetune": ("api.start", "finetune"),
    "load_reward": ("rewards.registry", "load"),
    "lora": ("models.lora", "lora"),
    "pretrain": ("api.new_model", "pretrain"),
    "open_run": ("api.saved_run", "open_run"),
    "read_prompts": ("recipes.prompts", "read_prompts"),
    "score": ("api.detector", "score"),
    "search_grid": ("evaluation.grid_search", "search_grid"),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        module, attribute = _LATER[name]
        return getattr(importlib.import_module(f".{module}", __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    errors = [
        "Diverged",
        "LoadError",
        "ModelError",
        "RewardError",
        "RunError",
        "RunExists",
        "ScoreactError",
        "SettingError",
    ]
    return sorted(["Config", "__version__", *errors, *_LATER])
