// SPDX-License-Identifier: Apache-2.0
/*
 * Many instances of kcov, each enabled by a thread that then sleeps: what do they cost?
 *
 *	instances signal COUNT ROUNDS CALLS	nanoseconds of one more thread's getppid(2), CALLS in
 *						a round; COUNT are enabled, its own included
 *	instances hold COUNT WORDS SECONDS	says "held", keeps them, ends
 *	instances memory COUNT			bytes that the guest's kernel takes for COUNT of the smallest
 *
 * Prints one JSON object. Knows nothing of the bridge.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kcov.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEVICE		"/sys/kernel/debug/kcov"
#define SMALLEST	512	/* words in a page */
#define LARGE		(512 << 10)
#define MAX_COUNT	1000
#define STACK		(64 << 10)

static int fds[MAX_COUNT];
static uint64_t *areas[MAX_COUNT];
static pthread_barrier_t start, enabled;

static void open_instance(int number, unsigned long words)
{
	fds[number] = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (fds[number] < 0)
		err(1, "%s", DEVICE);
	if (ioctl(fds[number], KCOV_INIT_TRACE, words))
		err(1, "KCOV_INIT_TRACE");
}

static void map_instance(int number, unsigned long words)
{
	areas[number] = mmap(NULL, words * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED,
			     fds[number], 0);
	if (areas[number] == MAP_FAILED)
		err(1, "mmap");
}

static void enable_instance(int number)
{
	if (ioctl(fds[number], KCOV_ENABLE, KCOV_TRACE_PC))
		err(1, "KCOV_ENABLE");
}

static void *idle(void *argument)
{
	pthread_barrier_wait(&start);
	enable_instance((int)(intptr_t)argument);
	pthread_barrier_wait(&enabled);
	for (;;)
		pause();
	return NULL;
}

/* Threads for the instances from @first on; they enable when all have met at the start. */
static void make_threads(int first, int count)
{
	pthread_attr_t attributes;

	pthread_barrier_init(&start, NULL, (unsigned int)(count - first) + 1);
	pthread_barrier_init(&enabled, NULL, (unsigned int)(count - first) + 1);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	for (int i = first; i < count; i++) {
		pthread_t id;

		errno = pthread_create(&id, &attributes, idle, (void *)(intptr_t)i);
		if (errno)
			err(1, "pthread_create");
	}
}

static void enable_all(void)
{
	struct timespec moment = { .tv_nsec = 100000000 };

	pthread_barrier_wait(&start);
	pthread_barrier_wait(&enabled);
	/* Until the last is asleep. */
	nanosleep(&moment, NULL);
}

static double measure(long calls)
{
	struct timespec begin, end;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (long i = 0; i < calls; i++)
		syscall(SYS_getppid);
	clock_gettime(CLOCK_MONOTONIC, &end);
	return ((double)(end.tv_sec - begin.tv_sec) * 1e9 +
		(double)(end.tv_nsec - begin.tv_nsec)) / (double)calls;
}

static void signal_cost(int count, int rounds, long calls)
{
	for (int i = 0; i < count; i++) {
		/* That of the thread which is measured has room for all its calls. */
		unsigned long words = i ? SMALLEST : LARGE;

		open_instance(i, words);
		map_instance(i, words);
	}
	make_threads(1, count);
	enable_all();
	enable_instance(0);
	printf("{\"ns\": [");
	for (int i = 0; i < rounds; i++) {
		__atomic_store_n(&areas[0][0], 0, __ATOMIC_RELAXED);
		printf("%s%.1f", i ? ", " : "", measure(calls));
	}
	printf("], \"pcs\": %" PRIu64 "}\n", areas[0][0]);
}

static void hold(int count, unsigned long words, unsigned int seconds)
{
	for (int i = 0; i < count; i++) {
		open_instance(i, words);
		map_instance(i, words);
	}
	make_threads(0, count);
	enable_all();
	printf("held\n");
	fflush(stdout);
	sleep(seconds);
}

/* Bytes of all objects in the kernel's slabs. */
static double slab_bytes(void)
{
	char line[512], name[64];
	double total = 0;
	long active, all, size;
	FILE *file = fopen("/proc/slabinfo", "r");

	if (!file)
		err(1, "/proc/slabinfo");
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "%63s %ld %ld %ld", name, &active, &all, &size) == 4)
			total += (double)active * (double)size;
	fclose(file);
	return total;
}

static double available_bytes(void)
{
	char line[128];
	long kib = -1;
	FILE *file = fopen("/proc/meminfo", "r");

	if (!file)
		err(1, "/proc/meminfo");
	while (kib < 0 && fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %ld", &kib) != 1)
			kib = -1;
	fclose(file);
	return (double)kib * 1024;
}

/* One step of the life of all instances: what it took, for each. */
static void report(const char *step, int count)
{
	static double last_slab, last_available;
	double slab = slab_bytes(), available = available_bytes();

	if (step)
		printf("\"%s\": [%.0f, %.0f]", step, (slab - last_slab) / count,
		       (last_available - available) / count);
	last_slab = slab_bytes();
	last_available = available_bytes();
}

static void memory(int count)
{
	struct rlimit limit = { .rlim_cur = 4096, .rlim_max = 4096 };

	if (setrlimit(RLIMIT_NOFILE, &limit))
		err(1, "setrlimit");
	make_threads(0, count);
	report(NULL, count);
	printf("{");
	for (int i = 0; i < count; i++)
		if (open("/dev/null", O_RDWR | O_CLOEXEC) < 0)
			err(1, "/dev/null");
	report("file", count);
	printf(", ");
	for (int i = 0; i < count; i++)
		open_instance(i, SMALLEST);
	report("open", count);
	printf(", ");
	for (int i = 0; i < count; i++)
		map_instance(i, SMALLEST);
	report("map", count);
	printf(", ");
	enable_all();
	report("enable", count);
	printf("}\n");
}

int main(int argc, char **argv)
{
	const char *mode = argc > 2 ? argv[1] : "";
	int count = argc > 2 ? atoi(argv[2]) : 0;

	if (count < 1 || count > MAX_COUNT)
		errx(2, "usage: instances signal COUNT ROUNDS CALLS | hold COUNT WORDS SECONDS | memory COUNT");
	if (!strcmp(mode, "signal") && argc == 5)
		signal_cost(count, atoi(argv[3]), atol(argv[4]));
	else if (!strcmp(mode, "hold") && argc == 5)
		hold(count, strtoul(argv[3], NULL, 10), (unsigned int)atoi(argv[4]));
	else if (!strcmp(mode, "memory") && argc == 3)
		memory(count);
	else
		errx(2, "no such mode: %s", mode);
	return 0;
}
