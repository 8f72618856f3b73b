#!/usr/bin/env python3
"""Stage 3: say by exact rules how small a network became, evaluate it, export it."""

from engine.program.launch import launch
from model_scoring.arguments import parser

if __name__ == "__main__":
    launch(parser(), "model_scoring.scoring")
