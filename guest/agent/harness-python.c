/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The harness `python`: a function of a Python module, in one interpreter for many cases.
 *
 *	python INTERPRETER SCRIPT MODULE FUNCTION
 *
 * SCRIPT is harness_python.py. Once it has the function, the interpreter traces into an area of its
 * own, which it enables itself, so that its start is not part of a case. It has the case in a memfd,
 * gets the length on a socket, and answers with a byte: '0', or '1' if the function raised, after
 * the traceback on stderr. If it dies, its status is the case's, and the next case gets another one.
 */
#define _GNU_SOURCE
#include "harness.h"
#include "scratch.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* Descriptors of the interpreter; harness_python.py has the same numbers. */
enum { CASE = 3, CONNECTION = 4, ERRORS = 5, AREA = 6 };

enum { ABOVE = 32, CASE_BYTES = 1 << 20 };

static char **arguments; /* INTERPRETER SCRIPT MODULE FUNCTION */
static int area = -1;
static int memory = -1;
static uint8_t *mapped;
static pid_t interpreter;
static int connection = -1;

static int load(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: python INTERPRETER SCRIPT MODULE FUNCTION\n");
		return 1;
	}
	arguments = argv + 1;
	return 0;
}

static void execute(int end)
{
	int instance = runner_area_descriptor(area);
	int high = instance < 0 ? -1 : fcntl(instance, F_DUPFD_CLOEXEC, ABOVE);
	int errors = fcntl(runner_error_descriptor(), F_DUPFD_CLOEXEC, ABOVE);

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* All are above, so that no dup2 closes another. */
	if (dup2(memory, CASE) < 0 || dup2(end, CONNECTION) < 0 || dup2(errors, ERRORS) < 0)
		_exit(126);
	close(AREA);
	if (high >= 0)
		dup2(high, AREA);
	setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
	setenv("PYTHONHASHSEED", "0", 1);
	execvp(arguments[0], arguments);
	fprintf(stderr, "python: %s: %s\n", arguments[0], strerror(errno));
	_exit(127);
}

/* The interpreter's answer; 0 if it died, with its status. */
static char answer(int *status)
{
	char byte;
	ssize_t got;

	do
		got = read(connection, &byte, 1);
	while (got < 0 && errno == EINTR);
	if (got == 1)
		return byte;
	close(connection);
	connection = -1;
	/* One that only closed its end is of no use. */
	kill(interpreter, SIGKILL);
	while (waitpid(interpreter, status, 0) < 0 && errno == EINTR)
		;
	interpreter = 0;
	return 0;
}

/* Start an interpreter, and wait until it has the function. Returns 0, or its status. */
static int start(void)
{
	int ends[2], high, status = 0;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends)) {
		perror("python: socketpair");
		_exit(1);
	}
	high = fcntl(ends[1], F_DUPFD_CLOEXEC, ABOVE);
	close(ends[1]);
	interpreter = fork();
	if (interpreter < 0 || high < 0) {
		perror("python: fork");
		_exit(1);
	}
	if (!interpreter)
		execute(high);
	close(high);
	connection = ends[0];
	return answer(&status) ? 0 : status;
}

static int begin(void)
{
	int fd;

	if (scratch_begin())
		return 1;
	fd = memfd_create("case", MFD_CLOEXEC);
	memory = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, ABOVE);
	if (memory < 0 || ftruncate(memory, CASE_BYTES)) {
		perror("python: the memory of the case");
		return 1;
	}
	close(fd);
	mapped = mmap(NULL, CASE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	if (mapped == MAP_FAILED) {
		perror("python: the memory of the case");
		return 1;
	}
	area = runner_area_take();
	return start() != 0;
}

static int run(const uint8_t *data, size_t length)
{
	uint32_t size = length > CASE_BYTES ? CASE_BYTES : length;
	int status = 0;

	if (!interpreter) {
		status = start();
		if (status)
			return status;
	}
	memcpy(mapped, data, size);
	if (send(connection, &size, sizeof(size), MSG_NOSIGNAL) == sizeof(size)) {
		char byte = answer(&status);

		/* What a function raises is what an assertion is to others. */
		return byte == '0' ? 0 : byte ? SIGABRT : status;
	}
	answer(&status);
	return status;
}

static void clean(void)
{
	scratch_clean(false);
}

RUNNER_HARNESS(python) = {
	.name = "python",
	.load = load,
	.begin = begin,
	.run = run,
	.clean = clean,
};
