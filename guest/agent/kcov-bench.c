// SPDX-License-Identifier: Apache-2.0
/*
 * kcov-bench: what the kcov device adds to a system call.
 *
 *	kcov-bench [ROUNDS [CALLS]]
 *
 * Times getppid(2), the cheapest call there is, with this thread's kcov off and on in turn (ROUNDS
 * times CALLS calls each), and prints one JSON object: nanoseconds a call for each round, and how
 * many PCs the area held after the last traced round.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/kcov.h>

#define DEVICE		"/sys/kernel/debug/kcov"
#define WORDS		(512 << 10)
#define MAX_ROUNDS	1000
#define FAILED		125

static double measure(long calls)
{
	struct timespec start, end;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (long i = 0; i < calls; i++)
		syscall(SYS_getppid);
	clock_gettime(CLOCK_MONOTONIC, &end);
	return ((double)(end.tv_sec - start.tv_sec) * 1e9 +
		(double)(end.tv_nsec - start.tv_nsec)) / (double)calls;
}

static void print_rounds(const char *name, const double *rounds, long count)
{
	printf("\"%s\": [", name);
	for (long i = 0; i < count; i++)
		printf("%s%.1f", i ? ", " : "", rounds[i]);
	printf("], ");
}

int main(int argc, char **argv)
{
	static double off[MAX_ROUNDS], on[MAX_ROUNDS];
	long rounds = argc > 1 ? atol(argv[1]) : 9;
	long calls = argc > 2 ? atol(argv[2]) : 5000;
	uint64_t *area;
	uint64_t last = 0;
	int fd;

	if (rounds < 1 || rounds > MAX_ROUNDS || calls < 1)
		errx(2, "usage: kcov-bench [ROUNDS (1-%d) [CALLS]]", MAX_ROUNDS);
	fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		err(FAILED, "%s", DEVICE);
	if (ioctl(fd, KCOV_INIT_TRACE, WORDS))
		err(FAILED, "KCOV_INIT_TRACE");
	area = mmap(NULL, WORDS * sizeof(*area), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED)
		err(FAILED, "mmap");
	for (long i = 0; i < rounds; i++) {
		off[i] = measure(calls);
		if (ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
			err(FAILED, "KCOV_ENABLE");
		__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
		on[i] = measure(calls);
		last = __atomic_load_n(&area[0], __ATOMIC_RELAXED);
		if (ioctl(fd, KCOV_DISABLE, 0))
			err(FAILED, "KCOV_DISABLE");
	}
	printf("{\"calls\": %ld, ", calls);
	print_rounds("off_ns", off, rounds);
	print_rounds("on_ns", on, rounds);
	printf("\"pcs\": %" PRIu64 "}\n", last);
	return 0;
}
