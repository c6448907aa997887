// SPDX-License-Identifier: Apache-2.0
/*
 * native_reads KIBIBYTES: what it takes to look at counters in the memory of another process, and to clear 40
 * of them, in each way. It writes a line for each: microseconds of processor time, and the way.
 */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 1000
#define GROUPS 40

static size_t bytes;
static char *theirs, *copy, *before;
static pid_t child;
static int memory, clear_refs;
static struct iovec local[GROUPS], remote[GROUPS];
static const uint32_t zero;
static volatile int differ;

static void *map(size_t size)
{
	void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (place == MAP_FAILED)
		exit(1);
	memset(place, 1, size);
	return place;
}

static char *group(int number)
{
	return theirs + (size_t)number * (bytes / GROUPS / 8 * 8);
}

static int by_pread(void)
{
	return pread(memory, copy, bytes, (off_t)theirs) == (ssize_t)bytes;
}

static int by_readv(void)
{
	struct iovec to = { copy, bytes }, from = { theirs, bytes };

	return process_vm_readv(child, &to, 1, &from, 1, 0) == (ssize_t)bytes;
}

static int by_compare(void)
{
	int found = 0;
	size_t i;

	for (i = 0; i < bytes; i += 16)
		found |= _mm_movemask_epi8(_mm_cmpeq_epi8(
				  _mm_load_si128((const __m128i *)(copy + i)),
				  _mm_load_si128((const __m128i *)(before + i)))) != 0xffff;
	differ = found;
	return 1;
}

static int by_pwrite(void)
{
	int i;

	for (i = 0; i < GROUPS; i++)
		if (pwrite(memory, &zero, sizeof(zero), (off_t)group(i)) != sizeof(zero))
			return 0;
	return 1;
}

static int by_writev(void)
{
	return process_vm_writev(child, local, GROUPS, remote, GROUPS, 0) == GROUPS * sizeof(zero);
}

static int by_clear_refs(void)
{
	return pwrite(clear_refs, "4", 1, 0) == 1;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static int open_of(const char *name, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)child, name);
	return open(path, flags | O_CLOEXEC);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*way)(void);
	} ways[] = {
		{ "copy by a read of /proc/PID/mem", by_pread },
		{ "copy by process_vm_readv", by_readv },
		{ "compare with a kept copy", by_compare },
		{ "clear 40 by writes to /proc/PID/mem", by_pwrite },
		{ "clear 40 by one process_vm_writev", by_writev },
		{ "clear soft-dirty bits", by_clear_refs },
	};
	static double taken[ROUNDS];
	int status = 0, i;
	size_t way;

	bytes = (size_t)(argc > 1 ? atoi(argv[1]) : 85) << 10;
	theirs = map(bytes);
	copy = map(bytes);
	before = map(bytes);
	child = fork();
	if (child < 0)
		return 1;
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* As large as a small server. */
		map(16 << 20);
		memset(theirs, 1, bytes);
		for (;;)
			pause();
	}
	usleep(200000);
	memory = open_of("mem", O_RDWR);
	clear_refs = open_of("clear_refs", O_WRONLY);
	for (i = 0; i < GROUPS; i++) {
		local[i] = (struct iovec){ (void *)&zero, sizeof(zero) };
		remote[i] = (struct iovec){ group(i), sizeof(zero) };
	}
	for (way = 0; way < sizeof(ways) / sizeof(*ways); way++) {
		int right = 1;

		for (i = 0; i < ROUNDS; i++) {
			double start = now();

			right &= ways[way].way();
			taken[i] = now() - start;
		}
		qsort(taken, ROUNDS, sizeof(*taken), compare);
		if (right)
			printf("%8.1f us  %s\n", taken[ROUNDS / 2], ways[way].name);
		else
			printf("       -     %s: not on this machine\n", ways[way].name);
	}
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	return 0;
}
