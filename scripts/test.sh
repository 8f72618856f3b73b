#!/usr/bin/env bash
# Sets up .venv and runs the tests, one worker a core up to four; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
