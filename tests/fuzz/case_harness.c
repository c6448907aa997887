/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness for tests, linked with kcov-runner.c: the first byte of a case says what it does.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned int cases; /* that this child has run */

/* Calls that differ, so that each leaves a PC of its own. */
static void calls(int getppids, int getuids)
{
	while (getppids-- > 0)
		syscall(SYS_getppid);
	while (getuids-- > 0)
		syscall(SYS_getuid);
}

static void *work(void *begun)
{
	int index = runner_thread_begin();

	*(int *)begun = index;
	calls(0, 3);
	runner_thread_end(index);
	return NULL;
}

/* Three threads, one after another, and one more than there are areas at once. */
static int threads(void)
{
	int index = -2;
	pthread_t thread;
	char text[32];

	calls(2, 0);
	if (pthread_create(&thread, NULL, work, &index) || pthread_join(thread, NULL))
		return 1 << 8;
	snprintf(text, sizeof(text), "%d", index);
	runner_output(text, strlen(text));
	return 0;
}

/* A process that traces by itself. */
static int process(void)
{
	int index = runner_area_take(), status;
	pid_t pid = fork();

	if (pid == 0) {
		if (runner_area_enable(index))
			_exit(1);
		calls(4, 0);
		_exit(0);
	}
	if (waitpid(pid, &status, 0) != pid)
		return 1 << 8;
	runner_area_give(index);
	return status;
}

static void sum(const uint8_t *data, size_t length)
{
	uint64_t hash = 0xcbf29ce484222325U;
	char text[64];

	for (size_t i = 0; i < length; i++)
		hash = (hash ^ data[i]) * 0x100000001b3U;
	snprintf(text, sizeof(text), "%zu %016lx", length, (unsigned long)hash);
	runner_output(text, strlen(text));
}

static void write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT, 0600);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fprintf(stderr, "%s: %m\n", path);
	close(fd);
}

/* A line to tests/fuzz/planted_target.py, and its answer; none if an exception ends it. */
static int tell_target(const uint8_t *line, size_t length)
{
	struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(7000) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	char answer[8];

	inet_pton(AF_INET, "10.0.2.100", &server.sin_addr);
	if (fd < 0 || connect(fd, (struct sockaddr *)&server, sizeof(server)) ||
	    write(fd, line, length) < 0 || write(fd, "\n", 1) < 0) {
		fprintf(stderr, "the target is not reached: %m\n");
		return 1 << 8;
	}
	if (read(fd, answer, sizeof(answer)) < 0)
		fprintf(stderr, "no answer: %m\n");
	close(fd);
	return 0;
}

static int run(const uint8_t *data, size_t length)
{
	char text[32];

	cases++;
	switch (length ? data[0] : 0) {
	case 'a':
		fprintf(stderr, "assertion failed: this is wrong\n");
		abort();
	case 'b': /* children that fork forever */
		for (;;)
			fork();
	case 'c':
		return tell_target(data + 1, length - 1);
	case 'e':
		exit(3);
	case 'h':
		for (;;)
			pause();
	case 'l': /* children that are left behind, then the end */
		for (int i = 0; i < 3; i++)
			if (fork() == 0)
				for (;;)
					pause();
		raise(SIGSEGV);
		break;
	case 'm': /* leaves a mark in the guest */
		snprintf(text, sizeof(text), "%d", access("/tmp/mark", F_OK) == 0);
		runner_output(text, strlen(text));
		write_to("/tmp/mark", "x");
		break;
	case 'n':
		snprintf(text, sizeof(text), "%u", cases);
		runner_output(text, strlen(text));
		break;
	case 'o':
		memset(text, 'o', sizeof(text));
		for (int i = 0; i < 4096; i++)
			runner_output(text, sizeof(text));
		break;
	case 'p':
		write_to("/proc/sysrq-trigger", "c");
		break;
	case 'q':
		return process();
	case 'R':
		write_to("/proc/sysrq-trigger", "b");
		break;
	case 'r': /* in a PID namespace: the end of all its processes */
		reboot(RB_AUTOBOOT);
		break;
	case 's':
		sum(data, length);
		break;
	case 't':
		return threads();
	case 'u': /* each time another call more */
		calls((int)cases, 0);
		break;
	case 'w':
		fprintf(stderr, "only a word\n");
		return 5 << 8;
	default:
		calls(3, length != 0);
	}
	return 0;
}

static void clean(void)
{
	syscall(SYS_getgid);
}

RUNNER_HARNESS(cases_harness) = { .name = "cases", .run = run, .clean = clean };

static int refuse(int argc, char **argv)
{
	fprintf(stderr, "no file %s\n", argc > 1 ? argv[1] : "at all");
	return 1;
}

RUNNER_HARNESS(refusing) = { .name = "refusing", .load = refuse, .run = run };

static int die(void)
{
	raise(SIGKILL);
	return 0;
}

RUNNER_HARNESS(dying) = { .name = "dying", .begin = die, .run = run };
