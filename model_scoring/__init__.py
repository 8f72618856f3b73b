"""Stage 3: count a network's parameters and operations by exact rules, evaluate it, export it."""
