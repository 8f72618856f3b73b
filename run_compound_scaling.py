#!/usr/bin/env python3
"""Stage 1: train MicroNet over a grid of depth and width multipliers."""

from engine.program.launch import launch
from model_compound_scaling.arguments import parser

if __name__ == "__main__":
    launch(parser(), "model_compound_scaling.search")
