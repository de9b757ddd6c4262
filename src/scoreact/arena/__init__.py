"""Update rules on problems over seeds at equal budgets, measured by one referee."""
