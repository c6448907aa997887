// SPDX-License-Identifier: Apache-2.0
/*
 * What system calls of many kinds leave in a kcov device's area.
 *
 *	calls DEVICE FILE ROUNDS
 *
 * Makes each call of calls.h ROUNDS times, in turn, and writes to FILE for each: the number of its
 * kind, how many PCs it left, and these, as 64-bit words. Prints the kinds' names, a line each. A
 * call that fills the area is an error.
 */
#define _GNU_SOURCE
#include "calls.h"

#define WORDS		(1UL << 20)

static uint64_t copy[WORDS];

int main(int argc, char **argv)
{
	uint64_t *area;
	FILE *file;
	int fd;

	if (argc != 4) {
		fprintf(stderr, "usage: calls DEVICE FILE ROUNDS\n");
		return 2;
	}
	set_up();
	area = kcov_open(argv[1], WORDS, &fd);
	file = fopen(argv[2], "wb");
	if (!file)
		die(argv[2]);
	memset(copy, 1, sizeof(copy));
	if (ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		die("KCOV_ENABLE");
	for (unsigned long i = 0; i < KINDS * strtoul(argv[3], NULL, 0); i++) {
		uint64_t head[2] = { i % KINDS };

		__atomic_store_n(&area[0], 0, __ATOMIC_SEQ_CST);
		kinds[i % KINDS].call();
		head[1] = __atomic_load_n(&area[0], __ATOMIC_SEQ_CST);
		if (head[1] >= WORDS - 1) {
			fprintf(stderr, "%s fills the area\n", kinds[i % KINDS].name);
			return 1;
		}
		/* Writing it leaves PCs of its own. */
		memcpy(copy, area + 1, head[1] * 8);
		if (fwrite(head, sizeof(head), 1, file) != 1 ||
		    fwrite(copy, 8, head[1], file) != head[1])
			die(argv[2]);
	}
	if (ioctl(fd, KCOV_DISABLE, 0) || fclose(file))
		die(argv[2]);
	for (unsigned int i = 0; i < KINDS; i++)
		puts(kinds[i].name);
	return 0;
}
