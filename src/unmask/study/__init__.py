"""Studies: grids of trainings and evaluations with equal budgets, resumable, summarised over problems and seeds."""
