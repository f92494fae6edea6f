"""What the system learns from: questions, passages and trajectories, and their pipelines."""
