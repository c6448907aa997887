// SPDX-License-Identifier: Apache-2.0
/*
 * How long a traced system call takes, and whether PCs come: prints "begun", calls getppid(2) under
 * kcov for a time and prints "NAME VALUE" lines.
 *
 *	patience MILLISECONDS
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/kcov.h>

#define WORDS 4096

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int main(int argc, char **argv)
{
	uint64_t end, calls = 0, empty = 0, longest = 0, last, before, now;
	int fd = open("/sys/kernel/debug/kcov", O_RDWR);
	uint64_t *area;

	if (fd < 0 || ioctl(fd, KCOV_INIT_TRACE, WORDS)) {
		perror("kcov");
		return 1;
	}
	area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED || ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC)) {
		perror("kcov");
		return 1;
	}
	before = now_ms();
	end = before + (argc > 1 ? strtoull(argv[1], NULL, 0) : 1000);
	puts("begun");
	fflush(stdout);
	/* From one look at the clock to the next, for that may be a traced call as well. */
	do {
		__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
		syscall(SYS_getppid);
		last = __atomic_load_n(&area[0], __ATOMIC_RELAXED);
		calls++;
		empty += !last;
		now = now_ms();
		if (now - before > longest)
			longest = now - before;
		before = now;
	} while (now < end);
	ioctl(fd, KCOV_DISABLE, 0);
	printf("calls %lu\nempty %lu\nlongest_ms %lu\nlast %lu\n", (unsigned long)calls,
	       (unsigned long)empty, (unsigned long)longest, (unsigned long)last);
	return 0;
}
