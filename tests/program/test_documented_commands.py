"""Commands in README and the docs are such that the programs take: no flag there is out of date."""

import re
import shlex
from pathlib import Path

import pytest

from helpers import ROOT
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser

PARSERS = {
    "run_compound_scaling.py": scaling_parser,
    "run_quantization.py": quantization_parser,
    "run_scoring.py": scoring_parser,
}
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]
VARIABLE = re.compile(r'^\s+([A-Z0-9]+)="?([^"\n]*)"?$', re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The command lines of a page's indented blocks, continued ones in one, with the page's variables put in."""
    text = page.read_text().replace("\\\n", " ")
    variables = {name: "FILE" if "$(" in value else value for name, value in VARIABLE.findall(text)}
    found = []
    for line in re.findall(r"^ {4,}(?:torchrun \S+ |python (?:-u )?)(run_\w+\.py .*)$", text, re.MULTILINE):
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], "1"), line)
        found.append(re.split(r"\s(?:>|\||#|;|&)", line)[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_understood(page):
    for command in commands(page):
        program, *arguments = shlex.split(command)
        PARSERS[program]().parse_args(arguments)


def test_there_are_commands():
    assert len(commands(ROOT / "README.md")) >= 4
    assert sum(len(commands(page)) for page in PAGES) >= 30
