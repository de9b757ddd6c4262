"""How good a policy is, and the optimum that it is measured against."""
