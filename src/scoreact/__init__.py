"""scoreact: continuous-time RL."""
__version__ = "0.1.0"
