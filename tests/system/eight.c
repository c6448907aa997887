// SPDX-License-Identifier: Apache-2.0
/*
 * Eight instances of 4 MiB, each enabled by a thread of its own, while all the threads work on a
 * directory: are they all given the same?
 *
 *	eight DIRECTORY ROUNDS LOWEST
 *
 * After the work each thread makes one last call, which brings it what it has not been given yet.
 * Only PCs from LOWEST on count: those below are a thread's own.
 * Prints a line "thread N: A PCs, B different, C missing" for each (missing is what others were
 * given and this one was not), then every PC that any was given, one a line. Knows nothing of
 * the bridge.
 */
#define _GNU_SOURCE
#include <dirent.h>
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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEVICE		"/sys/kernel/debug/kcov"
#define THREADS		8
#define WORDS		(512 << 10)
#define PATIENCE	100	/* rounds of a tenth of a second */

struct thread {
	int number, fd;
	uint64_t *area;
	/* The different PCs of the area, sorted. */
	uint64_t *pcs;
	size_t count, missing;
};

static const char *directory;
static int rounds, over;
static uint64_t lowest;
static struct thread threads[THREADS];
static uint64_t *all;
static size_t all_count;
static pthread_barrier_t barrier;

static int compare(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return a < b ? -1 : a > b;
}

/* Sorts, takes out repetitions and what does not count: how many are left. */
static size_t distinct(uint64_t *pcs, size_t count)
{
	size_t left = 0;

	qsort(pcs, count, sizeof(*pcs), compare);
	for (size_t i = 0; i < count; i++)
		if (pcs[i] >= lowest && (!left || pcs[left - 1] != pcs[i]))
			pcs[left++] = pcs[i];
	return left;
}

/* Whether all threads have been given the same; all others must be at rest. */
static int equal(void)
{
	int same = 1;

	all_count = 0;
	for (int i = 0; i < THREADS; i++) {
		struct thread *thread = &threads[i];

		thread->count = thread->area[0];
		if (thread->count > WORDS - 2)
			errx(1, "the area of thread %d is full", i);
		memcpy(thread->pcs, thread->area + 1, thread->count * sizeof(uint64_t));
		thread->count = distinct(thread->pcs, thread->count);
		memcpy(all + all_count, thread->pcs, thread->count * sizeof(uint64_t));
		all_count = distinct(all, all_count + thread->count);
	}
	for (int i = 0; i < THREADS; i++) {
		threads[i].missing = all_count - threads[i].count;
		same &= !threads[i].missing;
	}
	return same;
}

static void read_file(const char *name)
{
	char buffer[1000];
	int fd = open(name, O_RDONLY);

	if (fd < 0)
		err(1, "%s", name);
	while (read(fd, buffer, sizeof(buffer)) > 0)
		continue;
	close(fd);
}

static void list(void)
{
	DIR *entries = opendir(directory);

	if (!entries)
		err(1, "%s", directory);
	while (readdir(entries))
		continue;
	closedir(entries);
}

/* The threads do different things, so that what one covers is news to the others. */
static void work(int number)
{
	char name[300];
	struct stat status;
	int fd;

	switch (number % 4) {
	case 0:
		list();
		break;
	case 1:
		snprintf(name, sizeof(name), "%s/sizes/4097", directory);
		read_file(name);
		break;
	case 2:
		snprintf(name, sizeof(name), "%s/many/no-such-file-%d", directory, number);
		if (!stat(name, &status))
			errx(1, "%s exists", name);
		break;
	default:
		snprintf(name, sizeof(name), "%s/scratch/%c", directory, number < 4 ? 'a' : 'b');
		fd = open(name, O_WRONLY);
		if (fd < 0 || write(fd, name, strlen(name)) < 0)
			err(1, "%s", name);
		close(fd);
	}
}

static void *run(void *argument)
{
	struct thread *thread = argument;
	struct timespec moment = { .tv_nsec = 100000000 };

	if (ioctl(thread->fd, KCOV_ENABLE, KCOV_TRACE_PC))
		err(1, "KCOV_ENABLE in thread %d", thread->number);
	pthread_barrier_wait(&barrier);
	/* All are enabled, and nobody has begun. */
	__atomic_store_n(&thread->area[0], 0, __ATOMIC_RELAXED);
	pthread_barrier_wait(&barrier);
	for (int i = 0; i < rounds; i++)
		work(thread->number);
	for (int i = 0; !over; i++) {
		pthread_barrier_wait(&barrier);
		/* What serves the directory may have a little to do after its last answer. */
		nanosleep(&moment, NULL);
		pthread_barrier_wait(&barrier);
		syscall(SYS_getppid);
		pthread_barrier_wait(&barrier);
		if (!thread->number)
			over = equal() || i == PATIENCE;
		pthread_barrier_wait(&barrier);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t ids[THREADS];

	if (argc != 4 || (rounds = atoi(argv[2])) < 1)
		errx(2, "usage: eight DIRECTORY ROUNDS LOWEST");
	directory = argv[1];
	lowest = strtoull(argv[3], NULL, 16);
	pthread_barrier_init(&barrier, NULL, THREADS);
	all = malloc(2 * WORDS * sizeof(*all));
	for (int i = 0; i < THREADS; i++) {
		struct thread *thread = &threads[i];

		thread->number = i;
		thread->pcs = malloc(WORDS * sizeof(*thread->pcs));
		thread->fd = open(DEVICE, O_RDWR | O_CLOEXEC);
		if (!all || !thread->pcs || thread->fd < 0)
			err(1, "%s", DEVICE);
		if (ioctl(thread->fd, KCOV_INIT_TRACE, WORDS))
			err(1, "KCOV_INIT_TRACE");
		thread->area = mmap(NULL, WORDS * sizeof(uint64_t), PROT_READ | PROT_WRITE,
				    MAP_SHARED, thread->fd, 0);
		if (thread->area == MAP_FAILED)
			err(1, "mmap");
	}
	for (int i = 0; i < THREADS; i++) {
		errno = pthread_create(&ids[i], NULL, run, &threads[i]);
		if (errno)
			err(1, "pthread_create");
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(ids[i], NULL);
	for (int i = 0; i < THREADS; i++)
		printf("thread %d: %" PRIu64 " PCs, %zu different, %zu missing\n", i,
		       threads[i].area[0], threads[i].count, threads[i].missing);
	for (size_t i = 0; i < all_count; i++)
		printf("%#" PRIx64 "\n", all[i]);
	return 0;
}
