#!/bin/sh
# make.sh: make the sample dumps of this folder again (Debian or Ubuntu, root; about a minute, most of it for packages).
set -e
cd "$(dirname "$0")"
apt-get update -qq
apt-get install -y -qq --no-install-recommends qemu-system-x86 makedumpfile python3-libkdumpfile python3-venv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q python-snappy zstandard volatility3==2.28.2 kdmp-parser==0.7.4
mkdir "$work/files"
"$work/venv/bin/python" make.py . "$work/files"
rm -f others.json
/usr/bin/python3 others.py .
"$work/venv/bin/python" others.py .
