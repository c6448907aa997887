# SPDX-License-Identifier: Apache-2.0
"""Stand-alone reproducers of findings: a program or a script that needs nothing of kcov-bridge.

For the harness ``files`` it is a C program with the calls spelled out, which also prints what each
returned; for a command a shell script that has the case in it; for a Python function a Python
script; for ``LLVMFuzzerTestOneInput`` a C program to link with it.
"""

from __future__ import annotations

import base64
import functools
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bridge.fuzz.files_text import Call, Encoding, load_encoding
from bridge.util.resources import guest_directory

__all__ = ["Reproducer", "command_script", "files_program", "make_reproducer"]

_WIDTH: Final = 76


@dataclass(frozen=True)
class Reproducer:
    """A file that reproduces a finding.

    Attributes:
        name: of the file.
        text: its contents.
        use: how to run it in a guest, or how to build it, as one sentence.
    """

    name: str
    text: str
    use: str


def make_reproducer(
    title: str, harness: str, command: Sequence[str], case: bytes
) -> Reproducer | None:
    """Return the reproducer of a case; None for a harness of which there is none.

    Args:
        harness: the specification of the harness; empty for a command.
        command: its words.
    """
    words = harness.split()
    name = words[0] if words else ""
    if command:
        text = command_script(title, command, case)
        return Reproducer("reproducer.sh", text, "run it in the guest: sh reproducer.sh")
    if name == "files":
        use = "gcc -pthread -o reproducer reproducer.c; in the guest: ./reproducer /mnt/target"
        return Reproducer("reproducer.c", files_program(title, case), use)
    if name.startswith("python:"):
        _, module, function = name.split(":", 2)
        text = _python_script(title, module, function, case)
        return Reproducer("reproducer.py", text, "run it in the guest: python3 reproducer.py")
    if name.endswith((".so", ".a")):
        use = f"gcc -o reproducer reproducer.c {shlex.quote(name)}; run it in the guest"
        return Reproducer("reproducer.c", _llvm_program(title, case), use)
    return None


# ---- commands and functions


def command_script(title: str, command: Sequence[str], case: bytes) -> str:
    """Return a shell script that gives a case to a command, as ``@@`` or on stdin."""
    words = " ".join('"$case"' if word == "@@" else shlex.quote(word) for word in command)
    given = "" if "@@" in command else ' <"$case"'
    encoded = "\n".join(textwrap.wrap(base64.b64encode(case).decode(), _WIDTH))
    return (
        f"#!/bin/sh\n# {_comment(title)}\n"
        "case=$(mktemp) || exit 1\n"
        "trap 'rm -f \"$case\"' EXIT\n"
        f"base64 -d >\"$case\" <<'END_OF_CASE' || exit 1\n{encoded}\nEND_OF_CASE\n"
        f"{words}{given}\n"
    )


def _python_script(title: str, module: str, function: str, case: bytes) -> str:
    return (
        f"# {_comment(title)}\n"
        f"from {module} import {function}\n\n{function}(\n{_python_bytes(case)})\n"
    )


def _python_bytes(case: bytes) -> str:
    pieces = [case[at : at + 16] for at in range(0, len(case), 16)] or [b""]
    return "".join(f"    {piece!r}\n" for piece in pieces)


def _llvm_program(title: str, case: bytes) -> str:
    values = "\n".join(textwrap.wrap(", ".join(f"{value}" for value in case), _WIDTH))
    return (
        f"/* {_comment(title)} */\n#include <stddef.h>\n#include <stdint.h>\n\n"
        "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);\n"
        "__attribute__((weak)) int LLVMFuzzerInitialize(int *argc, char ***argv);\n\n"
        f"/* {len(case)} bytes */\nstatic const uint8_t bytes[] = {{\n{values or '0'}\n}};\n\n"
        "int main(int argc, char **argv)\n{\n"
        "\tif (LLVMFuzzerInitialize)\n\t\tLLVMFuzzerInitialize(&argc, &argv);\n"
        f"\treturn LLVMFuzzerTestOneInput(bytes, {len(case)});\n}}\n"
    )


def _comment(title: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in title).replace("*/", "* /")


# ---- the harness files

_CALLS: Final[Mapping[str, str]] = {
    "open": "keep({0}, open(at({1}), {2} | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, {3}))",
    "read": "read(f[{0}], buffer, {1})",
    "pread": "pread(f[{0}], buffer, {1}, {2})",
    "write": "write(f[{0}], filled({2}, {1}), {1})",
    "pwrite": "pwrite(f[{0}], filled({2}, {1}), {1}, {3})",
    "put": "write(f[{0}], {1})",
    "lseek": "lseek(f[{0}], {1}, {2})",
    "truncate": "truncate(at({0}), {1})",
    "ftruncate": "ftruncate(f[{0}], {1})",
    "rename": "syscall(SYS_renameat2, AT_FDCWD, at({0}), AT_FDCWD, at({1}), {2})",
    "link": "link(at({0}), at({1}))",
    "symlink": "symlink(at({0}), at({1}))",
    "readlink": "readlink(at({0}), (char *)buffer, sizeof(buffer))",
    "unlink": "unlink(at({0}))",
    "mkdir": "mkdir(at({0}), {1})",
    "rmdir": "rmdir(at({0}))",
    "list": "list(AT_FDCWD, at({0}), 0)",
    "getdents": "entries(f[{0}])",
    "stat": "stat(at({0}), &status)",
    "lstat": "lstat(at({0}), &status)",
    "fstat": "fstat(f[{0}], &status)",
    "statfs": "statfs(at({0}), &file_system)",
    "access": "access(at({0}), ({1}) >> 6 & 7)",
    "chmod": "chmod(at({0}), {1})",
    "fchmod": "fchmod(f[{0}], {1})",
    "chown": "lchown(at({0}), {1}, {1})",
    "utimens": "utimensat(AT_FDCWD, at({0}), (struct timespec[]){{{1}, {2}}}, 0)",
    "futimens": "futimens(f[{0}], (struct timespec[]){{{1}, {2}}})",
    "setxattr": "setxattr(at({0}), {1}, filled({3}, {2}), {2}, {4})",
    "getxattr": "getxattr(at({0}), {1}, buffer, {2})",
    "listxattr": "listxattr(at({0}), (char *)buffer, {1})",
    "removexattr": "removexattr(at({0}), {1})",
    "mread": "mapped(f[{0}], {1}, {2}, -1, 0)",
    "mwrite": "mapped(f[{0}], {1}, {2}, {3}, 0)",
    "msync": "mapped(f[{0}], {1}, {2}, {3}, 1)",
    "fsync": "fsync(f[{0}])",
    "fdatasync": "fdatasync(f[{0}])",
    "syncfs": "syncfs(f[{0}])",
    "fallocate": "fallocate(f[{0}], {1}, {2}, {3})",
    "copy": "copy_file_range(f[{0}], NULL, f[{1}], NULL, {2}, 0)",
    "sendfile": "sendfile(f[{0}], f[{1}], NULL, {2})",
    "advise": "(errno = posix_fadvise(f[{0}], {2}, {3}, {1})) ? -1 : 0",
    "flock": "flock(f[{0}], {1})",
    "setlk": "locked(f[{0}], F_OFD_SETLK, {1}, {2}, {3})",
    "getlk": "locked(f[{0}], F_OFD_GETLK, {1}, {2}, {3})",
    "dup": "keep({1}, fcntl(f[{0}], F_DUPFD_CLOEXEC, 3))",
    "close": "let_go({0})",
}
"""Each call in C, with its arguments; as ``guest/agent/files-world.c`` makes it."""

_HELPERS: Final[Mapping[str, str]] = {
    "let_go": """
/* Close a slot. */
static int let_go(int slot)
{
	int fd = f[slot];

	f[slot] = -1;
	return close(fd);
}
""",
    "keep": """
/* Put a descriptor into a slot. */
static int keep(int slot, int fd)
{
	int error = errno;

	if (fd < 0)
		return -1;
	if (f[slot] >= 0)
		close(f[slot]);
	f[slot] = fd;
	errno = error;
	return 0;
}
""",
    "filled": """
/* Bytes to write: first, first + 1, ... */
static const void *filled(unsigned int first, size_t length)
{
	for (size_t i = 0; i < length; i++)
		buffer[i] = first + i;
	return buffer;
}
""",
    "list": """
/* List a directory and all below it. */
static int list(int at, const char *name, int depth)
{
	int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (depth ? O_NOFOLLOW : 0));
	DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;
	struct stat found;

	if (!directory)
		return -1;
	while ((entry = readdir(directory)))
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && depth < 8 &&
			!fstatat(fd, entry->d_name, &found, AT_SYMLINK_NOFOLLOW) &&
			S_ISDIR(found.st_mode))
			list(fd, entry->d_name, depth + 1);
	return closedir(directory);
}
""",
    "entries": """
/* Read a directory from where it is to its end. */
static long entries(int fd)
{
	long length = 0;

	for (int i = 0; i < 64; i++) {
		length = syscall(SYS_getdents64, fd, buffer, 4096);
		if (length <= 0)
			break;
	}
	return length;
}
""",
    "mapped": """
static __thread sigjmp_buf *on_fault;

static void bus_error(int number)
{
	if (on_fault)
		siglongjmp(*on_fault, 1);
	signal(number, SIG_DFL);
	raise(number);
}

/* Read a mapping, or write first, first + 1, ... into it. */
static int mapped(int fd, off_t offset, size_t length, int first, int sync)
{
	int protection = first < 0 ? PROT_READ : PROT_READ | PROT_WRITE;
	volatile unsigned char *memory =
		mmap(NULL, length, protection, MAP_SHARED, fd, offset & ~4095LL);
	struct sigaction action = {.sa_handler = bus_error, .sa_flags = SA_NODEFER};
	volatile int value = -1;
	sigjmp_buf jump;

	if (memory == MAP_FAILED)
		return -1;
	sigaction(SIGBUS, &action, NULL);
	errno = EFAULT;
	if (!sigsetjmp(jump, 0)) {
		on_fault = &jump;
		for (size_t i = 0; i < length; i++)
			if (first < 0)
				(void)memory[i];
			else
				memory[i] = first + i;
		value = 0;
	}
	on_fault = NULL;
	if (sync && !value)
		value = msync((void *)memory, length, MS_SYNC);
	munmap((void *)memory, length);
	return value;
}
""",
    "locked": """
static int locked(int fd, int command, int type, off_t start, off_t length)
{
	struct flock lock = {
		.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length,
	};

	return fcntl(fd, command, &lock);
}
""",
}

_HEAD: Final = """\
/*
 * {title}
 *
 * Compile with gcc -pthread and run as root in a guest: reproducer DIRECTORY, where DIRECTORY is on
 * the target's mount. It prints what each call returned.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define CALL(text, value) (errno = 0, said(text, value))

static int f[] = {{{slots}}};
static __thread unsigned char buffer[65536];
static __thread struct stat status;
static __thread struct statfs file_system;

static void said(const char *call, long long value)
{{
	if (value < 0)
		printf("%s: %lld, %s\\n", call, value, strerror(errno));
	else
		printf("%s: %lld\\n", call, value);
}}

/* Where no directory can be made, names stand for what is there, in order. */
static struct {{ const char *name; char *path; }} stands[] = {{
	{{"a", NULL}}, {{"b", NULL}}, {{"c", NULL}}, {{"d/a", NULL}}, {{"d/b", NULL}},
	{{"d/e/a", NULL}},
	{{"e/a", NULL}}, {{"a/", NULL}}, {{"d", NULL}}, {{"e", NULL}}, {{"d/e", NULL}}, {{"d/", NULL}},
}};
static struct place {{ char *path; int directory; }} places[512];
static size_t place_count;

static const char *at(const char *name)
{{
	for (size_t i = 0; i < sizeof(stands) / sizeof(*stands); i++)
		if (stands[i].path && !strcmp(stands[i].name, name))
			return stands[i].path;
	return name;
}}

static void find(const char *path, int depth)
{{
	DIR *directory = opendir(path);
	struct dirent *entry;
	struct stat found;
	char *name;

	while (directory && place_count < 512 && (entry = readdir(directory))) {{
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (asprintf(&name, "%s%s%s", depth ? path : "", depth ? "/" : "", entry->d_name) < 0)
			continue;
		if (lstat(name, &found) || !(S_ISREG(found.st_mode) || S_ISDIR(found.st_mode)))
			continue;
		places[place_count].directory = S_ISDIR(found.st_mode);
		places[place_count++].path = name;
		if (S_ISDIR(found.st_mode) && depth < 4)
			find(name, depth + 1);
	}}
	if (directory)
		closedir(directory);
}}

static int by_path(const void *a, const void *b)
{{
	const struct place *left = a, *right = b;

	if (left->directory != right->directory)
		return left->directory - right->directory;
	return strcmp(left->path, right->path);
}}

static void assign(size_t name, size_t names, size_t first, size_t count)
{{
	for (size_t i = 0; i < names && count; i++) {{
		const char *path = places[first + i * count / names].path;
		const char *slash = strrchr(stands[name + i].name, '/');

		if (asprintf(&stands[name + i].path, "%s%s", path, slash && !slash[1] ? "/" : "") < 0)
			stands[name + i].path = NULL;
	}}
}}

static void find_places(void)
{{
	size_t files = 0;

	find(".", 0);
	qsort(places, place_count, sizeof(*places), by_path);
	while (files < place_count && !places[files].directory)
		files++;
	assign(0, 8, 0, files);
	assign(8, 4, files, place_count - files);
}}
"""

_MAIN: Final = """
int main(int argc, char **argv)
{{
	setvbuf(stdout, NULL, _IONBF, 0);
	(void)status;
	(void)file_system;
	(void)buffer;
	umask(0);
	if (argc != 2 || chdir(argv[1])) {{
		fprintf(stderr, "usage: reproducer DIRECTORY\\n");
		return 2;
	}}
	(void)at;
	if ((mkdir("kcov-bridge-fuzz", 0700) && errno != EEXIST) || chdir("kcov-bridge-fuzz"))
		find_places();
{body}	return 0;
}}
"""


def files_program(title: str, case: bytes) -> str:
    """Return a C program that makes the calls of a case of the harness ``files``."""
    encoding = load_encoding()
    constants = _constants()
    functions: list[str] = []
    body: list[str] = []
    section: list[Call] | None = None
    for call in encoding.decode(case)[0]:
        if call.name == "parallel":
            section = []
        elif call.name == "join":
            _add_section(section or [], functions, body, encoding, constants)
            section = None
        elif section is not None:
            section.append(call)
        else:
            body.append(_statement(call, encoding, constants))
    _add_section(section or [], functions, body, encoding, constants)
    made = "".join([*functions, *body])
    helpers = "".join(text for name, text in _HELPERS.items() if f"{name}(" in made)
    slots = ", ".join(["-1"] * encoding.numbers["SLOTS"])
    return (
        _HEAD.format(title=_comment(title), slots=slots)
        + helpers
        + "".join(functions)
        + _MAIN.format(body="".join(body))
    )


def _add_section(
    calls: Sequence[Call],
    functions: list[str],
    body: list[str],
    encoding: Encoding,
    constants: _Constants,
) -> None:
    """Add calls that threads make at the same time."""
    threads = sorted({call.thread or 0 for call in calls})
    if not threads:
        return
    first = len(functions)
    for thread in threads:
        statements = "".join(
            _statement(call, encoding, constants) for call in calls if (call.thread or 0) == thread
        )
        functions.append(
            f"\nstatic void *thread_{len(functions)}(void *unused)\n{{\n"
            f"\t(void)unused;\n{statements}\treturn NULL;\n}}\n"
        )
    lines = [f"pthread_t threads[{len(threads)}];", ""]
    for number in range(len(threads)):
        lines.append(f"pthread_create(&threads[{number}], NULL, thread_{first + number}, NULL);")
    lines += [f"pthread_join(threads[{number}], NULL);" for number in range(len(threads))]
    inner = "".join(f"\t\t{line}\n" if line else "\n" for line in lines)
    body.append(f"\t{{\n{inner}\t}}\n")


def _statement(call: Call, encoding: Encoding, constants: _Constants) -> str:
    text = encoding.show(call)
    words = text.split(" ")[1:]
    values = [
        _data(call.arguments[at]) if kind == "data" else constants.value(kind, words[at])
        for at, kind in enumerate(encoding.calls[call.name])
    ]
    shown = _string(text.encode() if len(text) <= _WIDTH else f"{text[:_WIDTH]}...".encode())
    return f"\tCALL({shown},\n\t     {_CALLS[call.name].format(*values)});\n"


def _data(data: bytes) -> str:
    return f"{_string(data)}, {len(data)}"


def _string(data: bytes) -> str:
    """Return a C string; octal escapes have three digits, so that none takes in what follows."""
    return '"' + "".join(
        chr(value) if 0x20 <= value < 0x7F and value not in b'"\\?' else f"\\{value:03o}"
        for value in data
    ) + '"'  # fmt: skip


@dataclass(frozen=True)
class _Constants:
    """What the words of a case are in C."""

    paths: Mapping[str, str]
    flags: Mapping[str, str]
    entries: Mapping[tuple[str, str], str]

    def value(self, kind: str, word: str) -> str:
        """Return an argument in C."""
        if kind == "slot":
            return word.removeprefix("f")
        if kind == "name":
            return self.paths[word]
        if kind == "open":
            access, *flags = word.split("|")
            first = {"r": "O_RDONLY", "w": "O_WRONLY", "rw": "O_RDWR"}[access]
            return " | ".join([first, *(self.flags[flag] for flag in flags)])
        if kind == "number":
            # The smallest one that -…LL can write is larger by one.
            return f"{word}LL"
        if kind == "xattr":
            return _string(word.encode())
        if kind == "time":
            special = {"now": "{0, UTIME_NOW}", "omit": "{0, UTIME_OMIT}"}
            return special.get(word, f"{{{word}LL, 0}}")
        return self.entries.get((kind, word), word)


@functools.cache
def _constants() -> _Constants:
    header = (guest_directory() / "agent" / "files-calls.h").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"^#define (FILES_\d+) ((?:\"[^\"]*\"|FILES_\d+| )+)$", header, re.M))
    paths = {}
    for text, path in re.findall(r"^\tNAME\(\"([^\"]+)\", (.+?)\)\s*(?:\\)?$", header, re.M):
        while (found := re.search(r"FILES_\d+", path)) is not None:
            path = path.replace(found[0], numbers[found[0]])
        paths[text] = path
    return _Constants(
        paths,
        dict(re.findall(r"^\tOPEN_FLAG\(\"(\w+)\", (\w+)\)", header, re.M)),
        {
            (name, text): value
            for name, text, value in re.findall(
                r"^\tENTRY\((\w+), \"([^\"]+)\", ([^)]+)\)", header, re.M
            )
        },
    )
