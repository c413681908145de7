"""Evaluation: grids of decoders and tasks, their records, statistics and figures."""
