// SPDX-License-Identifier: Apache-2.0
/*
 * open, INIT_TRACE, mmap, close of 4 MiB, over and over: nothing grows.
 *
 * KCOV_ROUNDS of the environment is the number of rounds, 10,000 without it.
 */
#include "kcov_test.h"

#define WORDS_LARGE (512UL << 10)

/* What the kernel keeps for itself, KiB. */
static long kernel_memory(void)
{
	FILE *file = fopen("/proc/meminfo", "r");
	char line[256];
	long kib, sum = 0;

	if (!file)
		bail("/proc/meminfo");
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "SUnreclaim: %ld", &kib) == 1 ||
		    sscanf(line, "VmallocUsed: %ld", &kib) == 1 ||
		    sscanf(line, "PageTables: %ld", &kib) == 1)
			sum += kib;
	fclose(file);
	return sum;
}

static int rounds(int number, int enable)
{
	for (int i = 0; i < number; i++) {
		struct kcov kcov = kcov_new(WORDS_LARGE);

		if (kcov.area[0] || kcov.area[WORDS_LARGE - 1])
			return i;
		kcov.area[WORDS_LARGE - 1] = 1;
		if (enable && (kcov_enable(&kcov) || !traces(&kcov) || kcov_disable(&kcov)))
			return i;
		kcov_free(&kcov);
	}
	return number;
}

int main(int argc, char **argv)
{
	const char *text = getenv("KCOV_ROUNDS");
	int number = text ? atoi(text) : 10000, tenth = number / 10;
	long before, grown;

	begin(argc, argv);
	is(rounds(tenth, 1), tenth, "a tenth of the rounds, each enabled for a call");
	before = kernel_memory();
	is(rounds(number, 0), number, "all rounds, each area zero");
	grown = kernel_memory() - before;
	if (!ok(grown < 1024, "the kernel has not grown by a MiB"))
		printf("# %d rounds: %ld KiB\n", number, grown);
	return end();
}
