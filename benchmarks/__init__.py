"""Benchmarks. Cells alternate, so that a slow moment of the machine meets all of them; ratios are taken within one run."""
