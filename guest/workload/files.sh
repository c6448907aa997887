#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# File work on a directory: list, walk, stat, read, copy, create, write, truncate, rename, remove.
#
#   files.sh [DIRECTORY]        (default /mnt/target)
#
# Prints one line for each thing done:
#   ok       it did what POSIX says
#   finding  the file system refused it or did something else; known servers do so
#   FAIL     what must work on every file system did not
# Exit status: 0, or 1 after a FAIL, or 2 if DIRECTORY is no directory.
#
# In DIRECTORY only files of its own and those in DIRECTORY/scratch are written to.

# sh -c gets its arguments by position: no expansion is meant in its text.
# shellcheck disable=SC2016

set -u
LC_ALL=C
export LC_ALL

dir=${1:-/mnt/target}
oks=0
findings=0
fails=0

ok() {
	oks=$((oks + 1))
	printf 'ok       %s\n' "$*"
}

finding() {
	findings=$((findings + 1))
	printf 'finding  %s\n' "$*"
}

fail() {
	fails=$((fails + 1))
	printf 'FAIL     %s\n' "$*"
}

# must TEXT COMMAND...: COMMAND has to succeed.
must() {
	text=$1
	shift
	if why=$("$@" 2>&1 >/dev/null); then ok "$text"; else fail "$text: $why"; fi
}

# may TEXT COMMAND...: COMMAND may be refused; gives its status.
may() {
	text=$1
	shift
	if why=$("$@" 2>&1 >/dev/null); then
		ok "$text"
	else
		finding "$text is refused: $why"
		return 1
	fi
}

if [ ! -d "$dir" ]; then
	printf 'files.sh: %s is no directory\n' "$dir" >&2
	exit 2
fi
work=$(mktemp -d /tmp/files.XXXXXX) || exit 1
own=$dir/files-sh.$$
trap 'rm -rf "$work"; rm -rf "$own" "$own.d" 2>/dev/null' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- list and walk ---------------------------------------------------------------------------

must "list $dir" ls -la "$dir"
if find "$dir" -type d >"$work/dirs" 2>"$work/why" &&
	find "$dir" -type f >"$work/files" 2>"$work/why"; then
	ok "walk: $(wc -l <"$work/dirs") directories, $(wc -l <"$work/files") files"
else
	fail "walk: $(cat "$work/why")"
fi
if find "$dir" | sort >"$work/once" && find "$dir" | sort >"$work/twice" &&
	cmp -s "$work/once" "$work/twice"; then
	ok "walk twice, see the same"
else
	fail "two walks saw different names"
fi

# --- stat and read ---------------------------------------------------------------------------

# What stat says has to be what reading gives; in two programs for all files, not two for each.
find "$dir" -type f -exec stat -c '%s %n' {} + 2>"$work/why" | sort >"$work/sizes"
find "$dir" -type f -exec wc -c {} + 2>>"$work/why" |
	sed -e 's/^ *//' -e '/^[0-9]* total$/d' | sort >"$work/read"
if [ -s "$work/why" ]; then
	fail "stat and read all files: $(head -n 1 "$work/why")"
elif cmp -s "$work/sizes" "$work/read"; then
	ok "stat and read $(wc -l <"$work/read") files"
else
	fail "stat and read disagree on a size"
fi

largest=$(find "$dir" -type f -exec ls -ln {} + | sort -k5,5n | tail -n 1 | sed 's|^[^/]*||')
if [ -n "$largest" ]; then
	dd if="$largest" of="$work/blocks" bs=8192 2>/dev/null
	dd if="$largest" of="$work/odd" bs=1777 2>/dev/null
	if cmp -s "$work/blocks" "$work/odd" && cmp -s "$largest" "$work/odd"; then
		ok "read $largest in blocks of two sizes"
	else
		fail "$largest reads differently in blocks of another size"
	fi
	dd if="$largest" of="$work/end" bs=1 skip=5 count=3 2>/dev/null
	if cat "$largest" | tail -c +6 | head -c 3 | cmp -s - "$work/end"; then
		ok "read from the middle"
	else
		fail "a read from the middle gives other bytes"
	fi
fi

# The message of a lookup that finds nothing: programs rely on "No such file".
if why=$(cat "$dir/no-such-file" 2>&1 >/dev/null); then
	fail "a file that is not there can be read"
else
	case $why in
	*"No such file"*) ok "a missing file is missing" ;;
	*) finding "a missing file is reported as: ${why##*: }" ;;
	esac
fi
if [ -n "$largest" ]; then
	if ls "$largest/below" >/dev/null 2>&1; then
		fail "a file can be walked through like a directory"
	else
		ok "a file is no directory"
	fi
fi

# --- copy out --------------------------------------------------------------------------------

if ! cp -r "$dir" "$work/copy" 2>"$work/why"; then
	fail "copy the tree out: $(head -n 1 "$work/why")"
elif diff -r "$dir" "$work/copy" >"$work/why" 2>&1; then
	ok "copy the tree out and compare it"
else
	fail "the copied tree differs: $(head -n 1 "$work/why")"
fi

# --- create ----------------------------------------------------------------------------------

writable=
may "create a file" sh -c ': >"$1"' sh "$own" && writable=$own
if may "make a directory" mkdir "$own.d"; then
	must "create a file in it" sh -c 'echo 1 >"$1/one"' sh "$own.d"
	must "remove both" rm -r "$own.d"
fi
if [ -z "$writable" ] && [ -d "$dir/scratch" ]; then
	writable=$(find "$dir/scratch" -type f | sort | head -n 1)
fi

# --- write -----------------------------------------------------------------------------------

if [ -z "$writable" ]; then
	finding "there is no file to write to"
else
	# Sizes around a TCP segment, a page and the 8 KiB that 9P servers like.
	for size in 1 100 1460 4096 8192 8193 50000; do
		head -c "$size" /dev/zero | tr '\0' 'w' >"$work/new"
		if ! dd if="$work/new" of="$writable" bs=64k conv=notrunc 2>"$work/why"; then
			fail "write $size bytes: $(tail -n 1 "$work/why")"
		elif head -c "$size" "$writable" | cmp -s - "$work/new"; then
			ok "write $size bytes and read them back"
		else
			fail "$size bytes written read back differently"
		fi
	done
	printf 'middle' | dd of="$writable" bs=1 seek=1000 conv=notrunc 2>/dev/null
	if [ "$(dd if="$writable" bs=1 skip=999 count=8 2>/dev/null)" = wmiddlew ]; then
		ok "write in the middle"
	else
		fail "a write in the middle went elsewhere"
	fi
	before=$(wc -c <"$writable")
	if echo tail >>"$writable" && [ "$(wc -c <"$writable")" -eq $((before + 5)) ] &&
		[ "$(tail -n 1 "$writable" | tail -c 5)" = tail ]; then
		ok "append"
	else
		finding "append: $before bytes became $(wc -c <"$writable")"
	fi

	# Opening with O_TRUNC has to empty the file.
	if ! echo hi >"$writable"; then
		fail "overwrite $writable"
	elif [ "$(wc -c <"$writable")" -eq 3 ]; then
		ok "overwrite with something shorter"
	elif [ "$(head -n 1 "$writable")" = hi ]; then
		finding "O_TRUNC is not honoured: after 'echo hi >FILE' the old tail is still there"
	else
		fail "what was overwritten does not begin with the new text"
	fi
	if may "truncate to 10 bytes" truncate -s 10 "$writable"; then
		size=$(stat -c %s "$writable")
		[ "$size" -eq 10 ] || finding "truncate to 10 bytes is acknowledged, the size is $size"
	fi

	# --- change, rename, remove -----------------------------------------------------------------

	if may "chmod 600" chmod 600 "$writable"; then
		mode=$(stat -c %a "$writable")
		[ "$mode" = 600 ] || finding "chmod 600 is acknowledged, the mode is $mode"
	fi
	if may "touch" touch -d '2001-02-03 04:05:06 UTC' "$writable"; then
		time=$(stat -c %Y "$writable")
		[ "$time" = 981173106 ] || finding "a time set is acknowledged, the time is another"
	fi
	if may "rename" mv "$writable" "$writable.new"; then
		if [ -e "$writable.new" ] && [ ! -e "$writable" ]; then
			may "rename back" mv "$writable.new" "$writable"
		else
			finding "rename is acknowledged but the old name stays"
		fi
	fi
	may "hard link" ln "$writable" "$own.link" && rm -f "$own.link"
	if may "remove" rm -f "$writable"; then
		if [ -e "$writable" ]; then finding "remove is acknowledged, the file stays"; fi
	fi
fi

may "statfs" stat -f "$dir"
must "list once more" ls -lR "$dir"

printf '%d ok, %d findings, %d failed\n' "$oks" "$findings" "$fails"
[ "$fails" -eq 0 ]
