#!/usr/bin/env bash
# Installs what the tests need into .venv, checks format, lint and types, runs all tests. Extra arguments go to pytest.
# Golden numbers are read from $GOLDEN_DIR and data from $DATA_DIR where these folders exist; other tests need nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install requirements-dev.txt
ruff check .
ruff format --check .
pyrefly check --summary=none
shellcheck --external-sources --source-path SCRIPTDIR scripts/*.sh
# One thread per process: the tests are small, and the threads of several processes would slow each other down.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist worksteal "$@"
