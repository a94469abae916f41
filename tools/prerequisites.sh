#!/bin/sh
# Says what this machine lacks, one line for each thing, and exits with 2 if there is any.
#
#   tools/prerequisites.sh [python] [platform] [compiler] [browser]
#
# python    a Python with venv, named by PYTHON (python3 by default): every verb
# platform  Linux on x86-64 whose seccomp lets another process answer system calls: demo, test
# compiler  gcc and the headers of the C library: test
# browser   Chromium: test-all
#
# POSIX sh, because Python may be what is missing.
# SECCOMP_ACTIONS names another list of seccomp actions than the kernel's; the tests use it.
set -u

PYTHON=${PYTHON:-python3}
SECCOMP_ACTIONS=${SECCOMP_ACTIONS:-/proc/sys/kernel/seccomp/actions_avail}
missing=0

lacks() {
    echo "vfiomig: $1" >&2
    missing=2
}

check_python() {
    if ! command -v "$PYTHON" >/dev/null 2>&1; then
        lacks "$PYTHON is not installed: apt install python3 python3-venv, or make PYTHON=/path/to/python3.11"
    elif ! version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        lacks "$PYTHON does not run: make PYTHON=/path/to/python3.11 chooses another"
    elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        lacks "$PYTHON is Python $version, 3.11 or later is needed: make PYTHON=/path/to/python3.11 chooses another"
    elif ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        lacks "$PYTHON has no venv module: apt install python3-venv"
    fi
}

check_platform() {
    system=$(uname -s)
    machine=$(uname -m)
    release=$(uname -r)
    major=${release%%.*}
    minor=${release#*.}
    minor=${minor%%[!0-9]*}
    if [ "$system" != Linux ]; then
        lacks "this is $system, the syscall door needs Linux"
        return
    fi
    if [ "$machine" != x86_64 ]; then
        lacks "this machine is $machine, the syscall door knows the system calls of x86_64 only"
    fi
    if [ "$major" -lt 5 ] || { [ "$major" -eq 5 ] && [ "$minor" -lt 19 ]; }; then
        # Before SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV a signal repeats a call that was answered.
        lacks "this kernel is $release, the syscall door needs Linux 5.19 or later"
    elif ! grep -qw user_notif "$SECCOMP_ACTIONS" 2>/dev/null; then
        lacks "this kernel has no seccomp user notification (CONFIG_SECCOMP_FILTER), or the sandbox around this shell hides it"
    fi
}

check_compiler() {
    if ! command -v gcc >/dev/null 2>&1; then
        lacks "gcc is not installed and the tests compile C programs: apt install gcc libc6-dev"
    elif ! printf '#include <stdio.h>\n#include <linux/types.h>\n' | gcc -x c -fsyntax-only - 2>/dev/null; then
        lacks "gcc finds no C headers: apt install libc6-dev"
    fi
}

check_browser() {
    for browser in chromium chromium-browser google-chrome; do
        command -v "$browser" >/dev/null 2>&1 && return
    done
    lacks "chromium is not installed and a test opens a page in it: apt install chromium"
}

for what in "$@"; do
    case $what in
    python) check_python ;;
    platform) check_platform ;;
    compiler) check_compiler ;;
    browser) check_browser ;;
    *) lacks "prerequisites.sh checks python, platform, compiler or browser, not '$what'" ;;
    esac
done
exit "$missing"
