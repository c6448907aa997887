// SPDX-License-Identifier: Apache-2.0
/*
 * A program with any number of blocks: native_blocks BLOCKS. For each line of its input, a number, it
 * covers as many blocks that lie apart, and answers. For "hits" it answers with the nanoseconds that a
 * block takes that was covered before. Calls the run time as a compiler's code does.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop);
void __sanitizer_cov_trace_pc_guard(uint32_t *guard);

static uint32_t guards[1 << 20];

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

int main(int argc, char **argv)
{
	uint32_t blocks = argc > 1 ? (uint32_t)atoi(argv[1]) : 1000, at = 0, i;
	char line[64];

	__sanitizer_cov_trace_pc_guard_init(guards, guards + blocks);
	for (i = 0; i < blocks; i++)
		__sanitizer_cov_trace_pc_guard(&guards[i]);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strncmp(line, "hits", 4)) {
			double start = now();

			for (i = 0; i < 10000000; i++)
				__sanitizer_cov_trace_pc_guard(&guards[i % 1024]);
			printf("%.2f\n", (now() - start) / 1e7);
		} else {
			for (i = (uint32_t)atoi(line); i > 0; i--) {
				at = (at + 7919) % blocks;
				__sanitizer_cov_trace_pc_guard(&guards[at]);
			}
			puts("done");
		}
		fflush(stdout);
	}
	return 0;
}
