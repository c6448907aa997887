// SPDX-License-Identifier: Apache-2.0
/*
 * Does each call get what the target did for it, while others work?
 *
 *	attribution DIRECTORY WORKERS SECONDS
 *
 * WORKERS processes stat a file in DIRECTORY, on a mount of the target, in turn alone and all at once.
 * Each has an instance of its own, and a file of its own (file-00, ...): about a name that several use
 * the kernel asks the target once. One more process makes calls that reach no target. Prints "NAME VALUE" lines:
 *
 *	quiet		calls that reach no target, and ...
 *	foreign		... how many of these got PCs
 *	stats		calls that reach it, while others work
 *	expected	how many PCs each of these must have: those of all calls when alone
 *	incomplete	calls without one of these
 *	spare		PCs of such calls that none had when alone
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/kcov.h>

#define WORDS	(64UL << 10)
#define ALONE	30
#define MOST	4096

struct result {
	long calls, foreign, incomplete, spare, expected;
};

struct shared {
	int waiting, go;
	struct result results[64];
};

static struct shared *shared;
static uint64_t *area;
static int device;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static void enable(void)
{
	device = open("/sys/kernel/debug/kcov", O_RDWR);
	if (device < 0 || ioctl(device, KCOV_INIT_TRACE, WORDS))
		err(2, "kcov");
	area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);
	if (area == MAP_FAILED)
		err(2, "mmap");
	if (ioctl(device, KCOV_ENABLE, KCOV_TRACE_PC))
		err(2, "KCOV_ENABLE");
}

static void await_all(void)
{
	__atomic_add_fetch(&shared->waiting, 1, __ATOMIC_SEQ_CST);
	while (!__atomic_load_n(&shared->go, __ATOMIC_SEQ_CST))
		usleep(1000);
}

static uint64_t count(void)
{
	return __atomic_load_n(&area[0], __ATOMIC_RELAXED);
}

static bool among(const uint64_t *pcs, uint64_t n, uint64_t pc)
{
	for (uint64_t i = 0; i < n; i++)
		if (pcs[i] == pc)
			return true;
	return false;
}

/* Calls that reach nothing: some that the kernel answers, and one that waits. */
static void quiet(struct result *result, double seconds)
{
	double end;

	enable();
	await_all();
	end = now() + seconds;
	do {
		for (int i = 0; i < 200; i++) {
			struct timespec moment = { .tv_nsec = 50000 };
			uint64_t before = count();

			if (i % 100 == 99)
				nanosleep(&moment, NULL);
			else if (i % 10 == 9)
				sched_yield();
			else
				syscall(SYS_getppid);
			result->calls++;
			result->foreign += count() != before;
		}
		__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
	} while (now() < end);
}

static void status(const char *name)
{
	struct stat unused;

	__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
	if (stat(name, &unused))
		err(2, "%s", name);
}

static void worker(struct result *result, int number, double seconds)
{
	static uint64_t always[MOST], ever[MOST];
	uint64_t n_always = 0, n_ever = 0;
	char name[16];
	double end;

	snprintf(name, sizeof(name), "file-%02d", number);
	enable();
	/* The first ones also look for what is not in the kernel's caches. */
	for (int i = 0; i < ALONE; i++) {
		uint64_t kept = 0;

		status(name);
		for (uint64_t j = 0; i > 3 && j < n_always; j++)
			if (among(area + 1, count(), always[j]))
				always[kept++] = always[j];
		for (uint64_t j = 1; i == 3 && j <= count() && kept < MOST; j++)
			always[kept++] = area[j];
		n_always = kept;
		for (uint64_t j = 1; j <= count() && n_ever < MOST; j++)
			if (!among(ever, n_ever, area[j]))
				ever[n_ever++] = area[j];
	}
	result->expected = (long)n_always;
	await_all();
	end = now() + seconds;
	do {
		bool all = true;

		status(name);
		result->calls++;
		for (uint64_t i = 0; i < n_always; i++)
			all = all && among(area + 1, count(), always[i]);
		result->incomplete += !all;
		for (uint64_t i = 1; i <= count(); i++)
			result->spare += !among(ever, n_ever, area[i]);
	} while (now() < end);
}

int main(int argc, char **argv)
{
	struct result stats = { 0 };
	int workers, failed = 0, code;
	double seconds;

	if (argc != 4)
		errx(2, "usage: attribution DIRECTORY WORKERS SECONDS");
	workers = atoi(argv[2]);
	seconds = atof(argv[3]);
	if (workers < 1 || workers > 25)
		errx(2, "1 to 25 workers");
	if (chdir(argv[1]))
		err(2, "%s", argv[1]);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		err(2, "mmap");
	for (int i = 0; i <= workers; i++) {
		pid_t child = fork();

		if (child < 0)
			err(2, "fork");
		if (!child) {
			if (i == 0)
				quiet(&shared->results[0], seconds);
			else
				worker(&shared->results[i], i, seconds);
			_exit(0);
		}
		/* One after the other, so that each is alone at first. */
		while (__atomic_load_n(&shared->waiting, __ATOMIC_SEQ_CST) <= i) {
			if (waitpid(-1, &code, WNOHANG) > 0)
				errx(2, "a process has ended");
			usleep(1000);
		}
	}
	__atomic_store_n(&shared->go, 1, __ATOMIC_SEQ_CST);
	while (wait(&code) > 0)
		failed |= code;
	for (int i = 1; i <= workers; i++) {
		const struct result *each = &shared->results[i];

		stats.calls += each->calls;
		stats.incomplete += each->incomplete;
		stats.spare += each->spare;
		stats.expected = i == 1 || each->expected < stats.expected ? each->expected : stats.expected;
	}
	printf("quiet %ld\nforeign %ld\nstats %ld\nexpected %ld\nincomplete %ld\nspare %ld\n",
	       shared->results[0].calls, shared->results[0].foreign, stats.calls, stats.expected,
	       stats.incomplete, stats.spare);
	return failed != 0;
}
