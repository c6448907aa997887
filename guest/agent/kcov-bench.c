// SPDX-License-Identifier: Apache-2.0
/*
 * kcov-bench: measures how the kcov device affects system calls. It does not depend on the bridge.
 *
 *	kcov-bench calls COUNT		each of COUNT getppid(2) alone, with this thread's kcov off
 *					and then on: mean and quantiles in nanoseconds, PCs left
 *	kcov-bench plain COUNT		the same calls once, with whatever kcov this thread has
 *	kcov-bench others COUNT [owner]	COUNT calls of a task that owns nothing, while another one
 *					has kcov enabled and sleeps, if "owner" is given
 *	kcov-bench stream SECONDS	getppid(2) with kcov on, for this time: number, PCs left
 *
 * getppid is the cheapest system call. Prints one JSON object. The time-stamp counter times single
 * calls, because reading the clock may be a system call itself.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
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
#include <x86intrin.h>

#include "kcov.h"

#define DEVICE		"/sys/kernel/debug/kcov"
#define WORDS		(512 << 10)
#define MAX_CALLS	200000
#define BURSTS		50
#define STREAM_BURST	1000
#define FAILED		125

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

	return left < right ? -1 : left > right;
}

/* Returns the area of a new instance, whose descriptor goes to @fd. */
static uint64_t *open_area(int *fd)
{
	uint64_t *area;

	*fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (*fd < 0)
		err(FAILED, "%s", DEVICE);
	if (ioctl(*fd, KCOV_INIT_TRACE, WORDS))
		err(FAILED, "KCOV_INIT_TRACE");
	area = mmap(NULL, WORDS * sizeof(*area), PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (area == MAP_FAILED)
		err(FAILED, "mmap");
	return area;
}

static void enable(int fd)
{
	if (ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		err(FAILED, "KCOV_ENABLE");
}

/* Times single calls, and prints the results. */
static void time_calls(const char *name, long count)
{
	static uint64_t cycles[MAX_CALLS];
	double begun, ns, per_cycle;
	uint64_t first, last;

	memset(cycles, 0, sizeof(cycles)); /* no page fault in between */
	begun = now_ns();
	first = last = __rdtsc();
	for (long i = 0; i < count; i++) {
		uint64_t now;

		syscall(SYS_getppid);
		now = __rdtsc();
		cycles[i] = now - last;
		last = now;
	}
	ns = now_ns() - begun;
	per_cycle = ns / (double)(last - first);
	qsort(cycles, (size_t)count, sizeof(*cycles), by_size);
	printf("\"%s\": {\"mean\": %.1f", name, ns / (double)count);
	printf(", \"p50\": %.1f", (double)cycles[count / 2] * per_cycle);
	printf(", \"p99\": %.1f", (double)cycles[count - 1 - count / 100] * per_cycle);
	printf(", \"p99.9\": %.1f}", (double)cycles[count - 1 - count / 1000] * per_cycle);
}

static void calls(long count)
{
	int fd;
	uint64_t *area = open_area(&fd);

	printf("{");
	time_calls("off", count);
	printf(", ");
	enable(fd);
	area[0] = 0;
	time_calls("on", count);
	if (ioctl(fd, KCOV_DISABLE, 0))
		err(FAILED, "KCOV_DISABLE");
	printf(", \"pcs\": %" PRIu64 "}\n", area[0]);
}

static void plain(long count)
{
	printf("{");
	time_calls("plain", count);
	printf("}\n");
}

static void getppid_call(void)
{
	syscall(SYS_getppid);
}

static void open_call(void)
{
	close(open("/dev/null", O_RDONLY | O_CLOEXEC));
}

/*
 * Returns nanoseconds per call in the quickest quarter of some bursts, about @count calls in all.
 * The quickest, because other work on the machine can only make a burst slower.
 */
static double quick_burst(void (*call)(void), long count)
{
	uint64_t bursts[BURSTS];

	for (int i = 0; i < BURSTS; i++) {
		double begun = now_ns();

		for (long j = 0; j < count / BURSTS; j++)
			call();
		bursts[i] = (uint64_t)((now_ns() - begun) * 1000);
	}
	qsort(bursts, BURSTS, sizeof(*bursts), by_size);
	return (double)bursts[BURSTS / 4] / 1000 / (double)(count / BURSTS);
}

/* Starts a process that enables kcov and sleeps. */
static pid_t make_owner(void)
{
	int ready[2];
	char byte;
	pid_t child;

	if (pipe(ready))
		err(FAILED, "pipe");
	child = fork();
	if (child < 0)
		err(FAILED, "fork");
	if (!child) {
		int fd;

		open_area(&fd);
		enable(fd);
		if (write(ready[1], "", 1) != 1)
			_exit(FAILED);
		for (;;)
			pause();
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		errx(FAILED, "the process that enables kcov did not start");
	close(ready[0]);
	/* Wait until it sleeps. */
	usleep(10000);
	return child;
}

static void others(long count, int with_owner)
{
	pid_t owner = with_owner ? make_owner() : 0;

	printf("{\"getppid\": %.2f", quick_burst(getppid_call, count));
	printf(", \"open, close\": %.2f}\n", quick_burst(open_call, count / 10) / 2);
	if (owner) {
		kill(owner, SIGKILL);
		waitpid(owner, NULL, 0);
	}
}

static void stream(double seconds)
{
	long count = 0;
	double begun, end;
	int fd;
	uint64_t *area = open_area(&fd);

	enable(fd);
	begun = now_ns();
	do {
		area[0] = 0;
		for (int i = 0; i < STREAM_BURST; i++)
			syscall(SYS_getppid);
		count += STREAM_BURST;
		end = now_ns();
	} while (end - begun < seconds * 1e9);
	printf("{\"calls\": %ld, \"seconds\": %.6f, \"pcs\": %" PRIu64 "}\n", count,
	       (end - begun) / 1e9, area[0]);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 2 ? argv[1] : "";
	long count = argc > 2 ? atol(argv[2]) : 0;

	if (!strcmp(mode, "calls") && argc == 3 && count >= 1000 && count <= MAX_CALLS)
		calls(count);
	else if (!strcmp(mode, "plain") && argc == 3 && count >= 1000 && count <= MAX_CALLS)
		plain(count);
	else if (!strcmp(mode, "others") && argc <= 4 && count >= 10 * BURSTS)
		others(count, argc == 4 && !strcmp(argv[3], "owner"));
	else if (!strcmp(mode, "stream") && argc == 3 && atof(argv[2]) > 0)
		stream(atof(argv[2]));
	else
		errx(2, "usage: kcov-bench calls COUNT (1000-%d) | plain COUNT | others COUNT (%d-) "
		     "[owner] | stream SECONDS", MAX_CALLS, 10 * BURSTS);
	return 0;
}
