"""The disk: run folder and checkpoints."""
