"""scoreact: fine-tune diffusion and flow models to a reward by continuous-time RL, the score being the action.

    import scoreact as sa
    result = sa.finetune(model, reward, prompts, iterations=40, out="runs/mine")

The equation and the objects are in the modules' own words: sde, solvers, policy, rollout, value, algorithms, trainer, run.
"""

from typing import TYPE_CHECKING, Any

from .training.config import Config as Config

if TYPE_CHECKING:
    from .runs.run import Result as Result
    from .runs.run import finetune as finetune

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`finetune` and `Result` on first use: torch takes seconds to import, and `scoreact --help` needs none of it."""
    if name in ("Result", "finetune"):
        from .runs import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
