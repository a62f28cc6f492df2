#!/bin/sh
# make_venv.sh PYTHON DIRECTORY: a virtual environment; on Debian and Ubuntu the module for it is a package of its own.
set -eu
python=$1 directory=$2
if ! command -v "$python" >/dev/null 2>&1; then
    echo "no $python: install Python 3.9 or newer, or say which one: make PYTHON=/path/to/python" >&2
    exit 1
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { echo "$python is older than Python 3.9" >&2; exit 1; }
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        patient="-o DPkg::Lock::Timeout=900 -o Acquire::Retries=5"
        # shellcheck disable=SC2086  # a list of options
        apt-get $patient update -qq && DEBIAN_FRONTEND=noninteractive apt-get $patient install -y -qq python3-venv >/dev/null
    else
        echo "$python has no venv module: apt-get install python3-venv" >&2
        exit 1
    fi
fi
exec "$python" -m venv "$directory"
