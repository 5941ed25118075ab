"""The real scheduler under a virtual clock: arrivals, step times, replicas, a listener's player, a report.

Everything that comes out of here is simulated; no GPU was measured.
"""
