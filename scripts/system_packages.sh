#!/bin/sh
# Installs what the tests need of the system and pip cannot bring: where it is missing, and where we are root on a system with apt.
# Elsewhere the tests that need it are skipped, and fail where CI=true.
set -u
missing=""
while read -r program packages; do
    command -v "$program" > /dev/null || missing="$missing $packages"
done << EOF
cc gcc libc6-dev
strace strace
chromium chromium fonts-dejavu-core
EOF
if [ -z "$missing" ]; then
    exit 0
elif [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    # shellcheck disable=SC2086  # a list of words
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
else
    echo "not installed, and tests need it:$missing" >&2
fi
