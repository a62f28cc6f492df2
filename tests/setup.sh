#!/bin/sh
# setup.sh: what the tests drive and pip cannot bring.  Installs by apt when it may; says what is missing when it may not.
# A test whose program is missing skips with that reason, and fails with VTDBG_REQUIRE_LIVE=1.
set -eu
missing=
need() {  # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need g++ g++
need gcc gcc
need objcopy binutils
need gdb gdb
need /usr/sbin/bpftool bpftool
need busybox busybox-static
need as binutils
need qemu-system-x86_64 qemu-system-x86
need chromium chromium
need chromedriver chromium-driver
need /usr/lib/wine/wine64 wine64
need x86_64-w64-mingw32-gcc gcc-mingw-w64-x86-64-win32
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    # Another apt may be at work (a fresh machine updates itself), and a download may fail once.
    patient="-o DPkg::Lock::Timeout=900 -o Acquire::Retries=5"
    # shellcheck disable=SC2086  # a list of options
    for pause in 10 30 60 0; do
        apt-get $patient update -qq && break
        sleep $pause
    done
    # shellcheck disable=SC2086  # lists of options and of package names
    DEBIAN_FRONTEND=noninteractive apt-get $patient install -y -qq $missing >/dev/null
else
    echo "tests that need these are skipped; to have them: apt-get install$missing" >&2
fi
