"""Benchmarks, with the machine's limits measured alongside."""
