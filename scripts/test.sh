#!/usr/bin/env bash
# Sets up .venv, then runs ruff, mypy and the tests, one worker a core up to four. Arguments go to pytest, and with any of
# them ruff and mypy are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
else
    echo "Arguments for pytest: ruff and mypy are skipped"
fi
python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
