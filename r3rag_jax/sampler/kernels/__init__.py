"""Hand-written kernels of the sampler, one folder per platform."""
