// SPDX-License-Identifier: Apache-2.0
/*
 * KCOV_TRACE_CMP from a program's side.
 *
 *	compare WORDS PATH [TIMES]
 *
 * One thread traces the comparisons, in an area of WORDS words, and another one at the same time
 * PCs, while each calls stat(PATH) TIMES times. Prints `errno N` of the first ENABLE for
 * comparisons and ends there if it is not 0; then a `cmp TYPE ARG1 ARG2 PC` line for each
 * comparison and a `pc PC` line for each PC, all in hex.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <linux/kcov.h>

#define PC_WORDS (64 << 10)
#define WORDS_PER_CMP 4 /* KCOV_WORDS_PER_CMP in kernel/kcov.c */

struct trace {
	unsigned long mode, words;
	uint64_t *area;
	int error;
};

static const char *path;
static int times = 1;
static pthread_barrier_t both_enabled, both_done;

static void work(void)
{
	struct stat status;

	for (int i = 0; i < times; i++)
		if (stat(path, &status))
			err(1, "%s", path);
}

static void *tracer(void *argument)
{
	struct trace *trace = argument;
	int fd = open("/sys/kernel/debug/kcov", O_RDWR);

	if (fd < 0 || ioctl(fd, KCOV_INIT_TRACE, trace->words))
		err(1, "kcov");
	trace->area = mmap(NULL, trace->words * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (trace->area == MAP_FAILED)
		err(1, "mmap");
	if (ioctl(fd, KCOV_ENABLE, trace->mode))
		trace->error = errno;
	__atomic_store_n(&trace->area[0], 0, __ATOMIC_RELAXED);
	/* From here on nothing is thrown away: the other's look-up may serve this one as well. */
	pthread_barrier_wait(&both_enabled);
	if (!trace->error)
		work();
	pthread_barrier_wait(&both_done);
	if (!trace->error && ioctl(fd, KCOV_DISABLE, 0))
		err(1, "KCOV_DISABLE");
	return NULL;
}

int main(int argc, char **argv)
{
	struct trace cmp = { .mode = KCOV_TRACE_CMP }, pc = { .mode = KCOV_TRACE_PC };
	pthread_t threads[2];
	uint64_t count;

	if (argc < 3)
		errx(2, "usage: compare WORDS PATH [TIMES]");
	cmp.words = strtoul(argv[1], NULL, 0);
	pc.words = PC_WORDS;
	path = argv[2];
	if (argc > 3)
		times = atoi(argv[3]);
	pthread_barrier_init(&both_enabled, NULL, 2);
	pthread_barrier_init(&both_done, NULL, 2);
	if (pthread_create(&threads[0], NULL, tracer, &cmp) ||
	    pthread_create(&threads[1], NULL, tracer, &pc))
		errx(1, "pthread_create");
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	printf("errno %d\n", cmp.error);
	if (cmp.error)
		return 0;
	count = __atomic_load_n(&cmp.area[0], __ATOMIC_RELAXED);
	for (uint64_t i = 0; i < count; i++) {
		const uint64_t *record = &cmp.area[1 + i * WORDS_PER_CMP];

		if (1 + (i + 1) * WORDS_PER_CMP > cmp.words)
			errx(1, "record %lu of %lu lies outside", (unsigned long)i,
			     (unsigned long)count);
		printf("cmp %lx %lx %lx %lx\n", (unsigned long)record[0],
		       (unsigned long)record[1], (unsigned long)record[2],
		       (unsigned long)record[3]);
	}
	count = __atomic_load_n(&pc.area[0], __ATOMIC_RELAXED);
	for (uint64_t i = 1; i <= count && i < pc.words; i++)
		printf("pc %lx\n", (unsigned long)pc.area[i]);
	return 0;
}
