# shellcheck shell=bash
# Makes .venv with all that training and evaluation need. Sourced by other scripts: `install FILE` makes it in the
# repository's root if it is missing and installs a requirements file into it, unless that was done before and neither
# file has changed. Then `python` is .venv's.
# PYTHON names the interpreter to build it from (default python3, 3.10 or newer).
install() {
    local root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || return
    stamp=".venv/.installed-$(cat requirements*.txt scripts/tested-versions.txt | cksum | cut -d ' ' -f 1)-$1"
    if [ ! -f "$stamp" ]; then
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv || return
        .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: Python 3.10 or newer is needed" >&2 && return 2; }
        echo "installing $1 into .venv (once, a few minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --requirement "$1" --constraint scripts/tested-versions.txt || return
        touch "$stamp"
    fi
    export PATH="$root/.venv/bin:$PATH"
}
if [ "${BASH_SOURCE[0]}" = "$0" ]; then install requirements.txt; fi
