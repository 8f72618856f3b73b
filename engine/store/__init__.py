"""What is on disk: whole writes, locks, reading without trust, checkpoints, the folders of runs."""
