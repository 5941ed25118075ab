"""The real scheduler on a virtual clock: arrivals, step times, replicas, a simulated player, a report.

All results are simulated; no GPU was measured.
"""
