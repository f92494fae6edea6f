"""The sampler: a batched generation engine with a KV cache, for rollouts and local judges."""
