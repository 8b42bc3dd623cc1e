"""What lies on the disk: the run folder and its checkpoints."""
