// SPDX-License-Identifier: Apache-2.0
/*
 * What the device does to system calls of tasks that own nothing.
 *
 *	others measure		nanoseconds of a call: before any instance was ever enabled, while
 *				another task owns one, and after that
 *	others trace EVENT	what another task's tracing of raw_syscalls/EVENT sees of CALLS calls
 *				that this one makes, having made some before; and how many of its
 *				own calls left a PC in the area of an owner meanwhile
 *
 * Prints names and numbers, a pair a line.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/kcov.h>

#define TRACING	"/sys/kernel/debug/tracing/"
#define WORDS	(512 << 10)
#define ROUNDS	60
#define CALLS	2000

struct shared {
	atomic_int ready, stop;
	long made;
	uint64_t pcs;
};

static struct shared *shared;

/* The quickest of many rounds: other work only ever makes a round slower. */
static double quickest(void)
{
	struct timespec start, end;
	double best = 1e9;

	for (int round = 0; round < ROUNDS; round++) {
		double ns;

		clock_gettime(CLOCK_MONOTONIC, &start);
		for (int i = 0; i < CALLS; i++)
			syscall(SYS_getppid);
		clock_gettime(CLOCK_MONOTONIC, &end);
		ns = ((double)(end.tv_sec - start.tv_sec) * 1e9 +
		      (double)(end.tv_nsec - start.tv_nsec)) / CALLS;
		if (ns < best)
			best = ns;
	}
	return best;
}

/* A child that owns an instance; @busy: it makes calls, and counts them. */
static pid_t start_owner(int busy)
{
	pid_t pid = fork();
	uint64_t *area;
	int fd;

	if (pid < 0)
		err(2, "fork");
	if (pid)
		return pid;
	fd = open("/sys/kernel/debug/kcov", O_RDWR);
	if (fd < 0 || ioctl(fd, KCOV_INIT_TRACE, WORDS))
		err(2, "kcov");
	area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED || ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		err(2, "kcov");
	__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
	shared->ready = 1;
	while (!shared->stop) {
		usleep(500);
		shared->made++;
		if (!busy)
			usleep(10000);
	}
	shared->pcs = area[0];
	_exit(0);
}

/* Ends this program if the owner ends without it. */
static void await_owner(pid_t pid)
{
	while (!shared->ready) {
		if (waitpid(pid, NULL, WNOHANG) == pid)
			errx(2, "the owner failed");
		usleep(1000);
	}
}

static void end_owner(pid_t pid)
{
	int status;

	shared->stop = 1;
	if (waitpid(pid, &status, 0) != pid || status)
		errx(2, "the owner failed");
}

static void put(const char *file, const char *text)
{
	int fd = open(file, O_WRONLY | O_TRUNC);

	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		err(2, "%s", file);
	close(fd);
}

static void trace(const char *event)
{
	char file[200], line[1000], mine[50], number[50];
	long seen = 0;
	FILE *lines;
	pid_t owner;

	owner = start_owner(1);
	await_owner(owner);
	/* Its first calls since the tracepoint was hooked. */
	for (int i = 0; i < 100; i++)
		syscall(SYS_getppid);
	put(TRACING "trace", "");
	put(TRACING "buffer_size_kb", "8192");
	snprintf(file, sizeof(file), TRACING "events/raw_syscalls/%s/enable", event);
	put(file, "1");
	for (int i = 0; i < CALLS; i++)
		syscall(SYS_getppid);
	put(file, "0");
	snprintf(mine, sizeof(mine), "-%d ", getpid());
	snprintf(number, sizeof(number), ": NR %d", SYS_getppid);
	lines = fopen(TRACING "trace", "r");
	if (!lines)
		err(2, "trace");
	while (fgets(line, sizeof(line), lines))
		seen += strstr(line, mine) && strstr(line, number);
	fclose(lines);
	usleep(20000);
	end_owner(owner);
	printf("calls %d\nseen %ld\nmade %ld\npcs %" PRIu64 "\n", CALLS, seen, shared->made,
	       shared->pcs);
}

static void measure(void)
{
	double before = quickest(), during;
	pid_t owner = start_owner(0);

	await_owner(owner);
	during = quickest();
	end_owner(owner);
	printf("before %.0f\nduring %.0f\nafter %.0f\n", before, during, quickest());
}

int main(int argc, char **argv)
{
	shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		err(2, "mmap");
	if (argc == 3 && !strcmp(argv[1], "trace"))
		trace(argv[2]);
	else if (argc == 2 && !strcmp(argv[1], "measure"))
		measure();
	else
		errx(2, "usage: others measure | trace EVENT");
	return 0;
}
