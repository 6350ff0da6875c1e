#!/bin/sh
# Installs Debian's chromium for the browser tests, if it is missing and can be installed. Otherwise they are skipped.
command -v chromium >/dev/null && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null
else
    echo "no chromium: the browser tests will be skipped (on Debian: sudo apt-get install chromium)"
fi
