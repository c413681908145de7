"""Studies: grids of trainings and evaluations with equal budgets, resumable, summarized over problems and seeds."""
