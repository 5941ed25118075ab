"""Continuous batching over paged keys and values: requests in, codes out, one synchronous core."""
