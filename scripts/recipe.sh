# shellcheck shell=bash disable=SC2034,SC2154 # variables that recipes use or set
# Sourced by the recipes, which have set `root`. Finds the packages: in the active environment, else in .venv.
fail() { # one line, exit code 2
    echo "error: $*" >&2
    exit 2
}
needs() { # needs COUNT WORDS "$@": at least COUNT arguments, which are WORDS
    [ $(($# - 2)) -ge "$1" ] || fail "$(basename "$0") takes $1 arguments: $2"
}
needs_data() {
    [ -n "${DATA:-}" ] || fail "DATA names the folder of the data set: DATA=/path bash scripts/$(basename "$0") ..."
}
nodes=${PET_NNODES:-1} # machines: torchrun reads its --nnodes from there, and scripts/slurm.sh sets it
# torchrun comes with torch
command -v torchrun >/dev/null || export PATH="$root/.venv/bin:$PATH"
command -v torchrun >/dev/null || fail "no packages here: bash scripts/install.sh makes .venv with all it needs"
