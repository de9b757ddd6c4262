"""People as the reward: what they compare, what they answered, and what is made of it."""
