/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Harnesses that measure what an execution costs, whatever the case is:
 *
 *	empty		does nothing
 *	calls		ten cheap system calls
 *	file PATH	ten system calls on a file: four times open and close, fstat, read
 */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CALLS 10
#define OPENS 4

static const char *path;

static int run_empty(const uint8_t *data, size_t length)
{
	(void)data;
	(void)length;
	return 0;
}

RUNNER_HARNESS(empty) = { .name = "empty", .run = run_empty };

static int run_calls(const uint8_t *data, size_t length)
{
	(void)data;
	(void)length;
	for (int i = 0; i < CALLS; i++)
		syscall(SYS_getppid);
	return 0;
}

RUNNER_HARNESS(calls) = { .name = "calls", .run = run_calls };

static int load_file(int argc, char **argv)
{
	int fd;

	if (argc != 2) {
		fprintf(stderr, "kcov-runner: the harness file wants one argument, a path\n");
		return 1;
	}
	path = argv[1];
	fd = open(path, O_RDONLY);
	if (fd < 0) {
		fprintf(stderr, "kcov-runner: %s cannot be opened: %m\n", path);
		return 1;
	}
	close(fd);
	return 0;
}

static int run_file(const uint8_t *data, size_t length)
{
	struct stat state;
	char byte;
	int fd = -1;

	(void)data;
	(void)length;
	for (int i = 0; i < OPENS; i++) {
		fd = open(path, O_RDONLY);
		if (i == OPENS - 1 && (fstat(fd, &state) || read(fd, &byte, 1) < 0))
			return 1 << 8;
		close(fd);
	}
	return fd < 0 ? 1 << 8 : 0;
}

RUNNER_HARNESS(file) = { .name = "file", .load = load_file, .run = run_file };
