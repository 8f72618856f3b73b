"""Stage 1: train MicroNet over a grid of depth and width multipliers, and keep the best network."""
