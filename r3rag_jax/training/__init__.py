"""Training: states, jitted steps, batches, the SFT and RL loops."""
