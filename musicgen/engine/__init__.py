"""Continuous batching with a paged KV cache: requests in, codes out, around a synchronous core."""
