"""Stage 2: entropy-constrained trained ternarization (EC2T), and entropy-constrained pruning."""
