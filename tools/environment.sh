#!/bin/sh
# Installs one lock into .venv, which it makes where there is none, and links this checkout there.
#
#   tools/environment.sh requirements/run.txt
#
# The package is linked and not installed: a line in site-packages names src/, and bin/vfiomig
# starts it. That needs no build backend, no second look at the index, and survives a moved checkout.
set -u

lock=$1
python=.venv/bin/python
log=.venv/pip.log

fail() {
    echo "vfiomig: $1" >&2
    exit 2
}

# A .venv may be half made (Ctrl-C) or belong to a Python that is gone.
usable() {
    "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_environment() {
    sh tools/prerequisites.sh python || exit 2
    echo "making .venv"
    "${PYTHON:-python3}" -m venv --clear .venv >/dev/null || fail "python cannot make .venv, its words stand above"
}

# An index that answers 404 is there and lacks a package.
index_was_unreachable() {
    grep -E 'Retrying|Could not fetch URL|is not a trusted or secure host' "$log" | grep -qv ' 404 '
}

install_lock() {
    echo "installing $lock"
    rm -f "$log"
    # Wheels only: a source package would build with tools that no lock pins.
    "$python" -m pip install --quiet --log "$log" --disable-pip-version-check --no-input \
        --require-hashes --no-deps --only-binary :all: --requirement "$lock" >/dev/null 2>&1 && return
    if grep -q 'DO NOT MATCH THE HASHES' "$log"; then
        fail "a package differs from the one that $lock pins, nothing was installed; see $log"
    elif index_was_unreachable; then
        fail "no package index can be reached: connect to a network, or name your index in PIP_INDEX_URL; see $log"
    elif grep -q 'No matching distribution found' "$log"; then
        fail "the package index lacks a release that $lock pins, or has none for this Python: name another index in PIP_INDEX_URL; see $log"
    fi
    fail "pip could not install $lock; see $log"
}

link_checkout() {
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || fail "$python does not run"
    # Relative to site-packages, .venv/lib/python3.N/site-packages.
    echo ../../../../src >"$packages/vfiomig.pth"
    cat >.venv/bin/vfiomig <<'LAUNCHER'
#!/bin/sh
program='import sys; from vfiomig_command import main; sys.exit(main())'
exec "$(dirname "$(readlink -f "$0")")/python" -P -c "$program" "$@"
LAUNCHER
    chmod +x .venv/bin/vfiomig
}

usable || make_environment
install_lock
link_checkout
