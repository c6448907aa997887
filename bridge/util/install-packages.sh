#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Install the Debian packages of debian-packages.txt that are missing.
#
#   install-packages.sh [--print] KIND...     KIND: run, user, bench, test or make
#   install-packages.sh --package PACKAGE     one package by name
#
# As root, or through sudo if that needs no password; else the line to run goes to stdout, as it does
# with --print. Exit status: 0 nothing is missing now, 2 something is to be done by hand, else
# apt-get's own. Used by `make` (.ci/install-packages) and by `kcov-bridge setup`.

set -eu
list=$(dirname "$0")/debian-packages.txt

print=
if [ "${1:-}" = --print ]; then
	print=yes
	shift
fi
missing=
programs=
if [ "${1:-}" = --package ]; then
	missing=" $2"
	programs=" $2"
else
	for kind in "$@"; do
		while read -r package for probe what; do
			[ "$for" = "$kind" ] || continue
			case $probe in
			/*) [ ! -e "$probe" ] || continue ;;
			*) ! PATH=$PATH:/usr/sbin:/sbin command -v "$probe" >/dev/null || continue ;;
			esac
			missing="$missing $package"
			programs="$programs $probe"
			echo "missing: $package ($what)" >&2
		done <<-END
			$(grep -v '^#' "$list")
		END
	done
fi
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "apt-get is missing, so this is not Debian; install these with your system's tools:$programs" >&2
	exit 2
fi
if [ "$(id -u)" -eq 0 ]; then
	root=
elif [ -z "$print" ] && command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
	root="sudo -n"
else
	print=yes
fi
if [ -n "$print" ]; then
	echo "packages are missing, and installing them needs root or sudo; run this line, then try again:" >&2
	echo "sudo apt-get update && sudo apt-get install -y --no-install-recommends$missing"
	exit 2
fi

# The words are lists on purpose from here on.
# shellcheck disable=SC2086
install() {
	$root env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -q --no-install-recommends $missing </dev/null
}

echo "installing:$missing" >&2
# A bare machine has no package lists, an old one has stale ones.
# shellcheck disable=SC2086
install 2>/dev/null || { $root apt-get update -q </dev/null && install; }
