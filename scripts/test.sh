#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest -q tests "$@"
