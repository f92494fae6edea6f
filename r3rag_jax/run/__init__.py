"""What a run leaves on disk and reports while it works: directory, checkpoints, metrics, trackers, progress."""
