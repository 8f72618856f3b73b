#!/usr/bin/env python3
"""Stage 2: make a trained network ternary and sparse with EC2T, or prune it."""

from engine.program.launch import launch
from model_quantization.arguments import parser

if __name__ == "__main__":
    launch(parser(), "model_quantization.grid")
