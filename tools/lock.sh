#!/bin/sh
# Writes requirements/*.txt from pyproject.toml: every release with the hashes of all its files.
#
#   tools/lock.sh [--upgrade]
#
# Releases that are pinned already stay, unless --upgrade says otherwise. dev.txt holds everything
# that a checkout may need; the others are parts of it, so that one environment can take them all.
set -eu

compile() {
    name=$1
    shift
    .venv/bin/uv pip compile pyproject.toml "$@" --output-file "requirements/$name.txt" --quiet \
        --universal --python-version 3.11 --generate-hashes --system-certs \
        --no-emit-index-url --no-header --no-annotate
    echo "requirements/$name.txt"
}

compile dev --extra cli --extra report --group test --group dev "$@"
compile test --extra cli --extra report --group test --constraint requirements/dev.txt "$@"
compile run --extra cli --extra report --constraint requirements/dev.txt "$@"
compile build --group build --constraint requirements/dev.txt "$@"
compile lock --group lock "$@"
