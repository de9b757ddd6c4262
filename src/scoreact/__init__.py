"""scoreact: fine-tune diffusion and flow models to a reward by continuous-time RL, the score being the action.

    import scoreact as sa
    result = sa.finetune(model, reward, prompts, iterations=40, out="runs/mine")

The equation and the objects are in the modules' own words: sde, solvers, policy, rollout, value, algorithms, trainer.
"""

__version__ = "0.1.0"

from .config import Config as Config
from .trainer import Result as Result
from .trainer import finetune as finetune
