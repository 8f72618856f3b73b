# Sourced by the other scripts: makes .venv, installs requirements.txt where it changed, activates.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    echo "Installing requirements.txt into .venv"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed-requirements.txt
fi
source .venv/bin/activate
