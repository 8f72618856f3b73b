"""What a shell sees: command lines, one-line errors, exit codes, interruptions, progress and tables."""
