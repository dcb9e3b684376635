#!/usr/bin/env bash
# Chromium, in which tests/report looks at the pages of reports.
#   scripts/chromium.sh check      exit code 0 if there is one, else 1 and the reason
#   scripts/chromium.sh install    installs Debian's package where there is none (needs root)
set -euo pipefail

_say() { echo "chromium: $*" >&2; }

check() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return 0
    done
    _say "not found; run scripts/chromium.sh install"
    return 1
}

install() {
    check 2>/dev/null && return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        _say "cannot install it: needs root and apt-get"
        return 1
    fi
    _say "installing chromium"
    apt-get update -qq || true # old package lists may be enough
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null
}

case "${1:-}" in
    check | install) "$1" ;;
    *) _say "check or install" && exit 2 ;;
esac
