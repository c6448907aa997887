/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The harness `command`: a program for each case, which gets it on its standard input, or in a file
 * whose path stands where a word has @@.
 *
 *	command [-e] WORD...
 *
 * A program that is killed by a signal makes that the status of the case; with -e, one that exits
 * with another status than 0 makes that the case's too. Most programs do so for input that they
 * refuse. What the program writes is the output of a case that went wrong.
 */
#define _GNU_SOURCE
#include "harness.h"
#include "scratch.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CASE "/tmp/case"
#define MARK "@@"

enum { NOT_EXECUTABLE = 126, NOT_FOUND = 127 };

static char **words;
static bool by_file, exit_counts;
static int area = -1;
static int input = -1;

/* The word with the file's path in place of each mark. */
static char *replaced(const char *word)
{
	size_t length = strlen(word) + 1;
	char *result, *to;

	for (const char *mark = word; (mark = strstr(mark, MARK)); mark += strlen(MARK))
		length += strlen(CASE);
	result = to = malloc(length);
	if (!result)
		return NULL;
	while (*word) {
		if (strncmp(word, MARK, strlen(MARK))) {
			*to++ = *word++;
			continue;
		}
		to = stpcpy(to, CASE);
		word += strlen(MARK);
		by_file = true;
	}
	*to = 0;
	return result;
}

/* Whether a program can be executed: a path, or a name to be found in PATH. */
static bool is_executable(const char *name)
{
	const char *path = getenv("PATH");
	char candidate[4096];

	if (strchr(name, '/'))
		return !access(name, X_OK);
	while (path && *path) {
		size_t length = strcspn(path, ":");

		if (snprintf(candidate, sizeof(candidate), "%.*s/%s", (int)length, path, name) <
			    (int)sizeof(candidate) &&
		    !access(candidate, X_OK))
			return true;
		path += length + (path[length] == ':');
	}
	return false;
}

static int load(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "-e")) {
		exit_counts = true;
		argc--;
		argv++;
	}
	if (argc < 2) {
		fprintf(stderr, "command: no program\n");
		return 1;
	}
	if (!is_executable(argv[1])) {
		fprintf(stderr, "command: the guest has no program %s\n", argv[1]);
		return 1;
	}
	words = calloc(argc, sizeof(*words));
	for (int i = 1; words && i < argc; i++) {
		words[i - 1] = replaced(argv[i]);
		if (!words[i - 1])
			words = NULL;
	}
	if (!words)
		perror("command");
	/* A sanitizer's finding is a signal then, which is how a status is known to be one. */
	setenv("ASAN_OPTIONS", "abort_on_error=1:detect_leaks=0", 0);
	setenv("UBSAN_OPTIONS", "abort_on_error=1:halt_on_error=1", 0);
	setenv("MSAN_OPTIONS", "abort_on_error=1", 0);
	return words == NULL;
}

static int begin(void)
{
	if (scratch_begin())
		return 1;
	if (!by_file)
		input = memfd_create("case", MFD_CLOEXEC);
	if (!by_file && input < 0)
		perror("command: the file of the case");
	return !by_file && input < 0;
}

/* Returns 0 or errno. */
static int write_case(const uint8_t *data, size_t length)
{
	if (by_file) {
		if (input >= 0)
			close(input);
		/* The directory is empty: the file goes with all that the program leaves there. */
		input = open(CASE, O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	} else if (ftruncate(input, 0)) {
		return errno;
	}
	if (input < 0)
		return errno;
	while (length) {
		ssize_t written = write(input, data, length);

		if (written < 0)
			return errno;
		data += written;
		length -= written;
	}
	return lseek(input, 0, SEEK_SET) ? errno : 0;
}

__attribute__((noreturn)) static void execute(void)
{
	int error;

	/* A group of its own, so that it cannot stop the runner from a terminal's point of view. */
	setpgid(0, 0);
	if ((!by_file && dup2(input, 0) < 0) || dup2(2, 1) < 0)
		_exit(NOT_EXECUTABLE);
	error = area > 0 ? runner_area_enable(area) : 0;
	if (error) {
		fprintf(stderr, "command: KCOV_ENABLE: %s\n", strerror(error));
		_exit(NOT_EXECUTABLE);
	}
	execvp(words[0], words);
	error = errno;
	fprintf(stderr, "command: %s: %s\n", words[0], strerror(error));
	_exit(error == ENOENT ? NOT_FOUND : NOT_EXECUTABLE);
}

static int run(const uint8_t *data, size_t length)
{
	int error = write_case(data, length);
	int status;
	pid_t pid, ended;

	if (error) {
		fprintf(stderr, "command: the file of the case: %s\n", strerror(error));
		_exit(1);
	}
	if (area < 0)
		area = runner_area_take();
	pid = fork();
	if (pid < 0) {
		perror("command: fork");
		_exit(1);
	}
	if (!pid)
		execute();
	do {
		/* Orphans of the program come here as well. */
		ended = waitpid(-1, &status, 0);
	} while (ended != pid && (ended > 0 || errno == EINTR));
	if (WIFEXITED(status) && !exit_counts && WEXITSTATUS(status) < NOT_EXECUTABLE)
		return 0;
	return status;
}

static void clean(void)
{
	scratch_clean(true);
}

RUNNER_HARNESS(command) = {
	.name = "command",
	.load = load,
	.begin = begin,
	.run = run,
	.clean = clean,
};
