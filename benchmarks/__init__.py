"""Benchmarks: what is measured, and the machine's own limits beside it."""
