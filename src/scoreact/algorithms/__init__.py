"""Update rules. Each is two functions: `prepare` (paths and rewards -> rows) and `loss` (a minibatch of them).

What the author of a rule needs is named here; CONTRIBUTING.md writes one in thirty lines.
"""

from ..control.critic import Critic
from ..control.transitions import Batch, Paths, Rows
from ..support.settings import setting
from .base import Rule
from .forward import ForwardRule

__all__ = ["Batch", "Critic", "ForwardRule", "Paths", "Rows", "Rule", "setting"]
