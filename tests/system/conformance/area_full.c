// SPDX-License-Identifier: Apache-2.0
/* Count and PCs never pass the end; what does not fit is dropped. */
#include "kcov_test.h"

static void fill(uint64_t words)
{
	struct kcov kcov = kcov_new(words), behind = kcov_new(words), before;
	uint64_t last = words - 1;

	before = kcov_new(words);
	printf("# %llu words\n", (unsigned long long)words);
	is(kcov_enable(&kcov), 0, "ENABLE");
	reset(&kcov);
	calls(2000);
	if (count(&kcov) < last) {
		set_count(&kcov, last - 5);
		calls(100);
	}
	is(count(&kcov), last, "the count stops at the number of words less one");
	ok(kcov.area[last] >> 31 == 0x1ffffffff, "the last word is a PC");
	calls(100);
	is(count(&kcov), last, "a full area stays full");
	ok(!before.area[0] && !before.area[last] && !behind.area[0] && !behind.area[last],
	   "nothing is written into others");
	ok(traces(&kcov), "word 0 set to 0 starts anew");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&before);
	kcov_free(&behind);
	kcov_free(&kcov);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	fill(PAGE_WORDS);
	fill(WORDS);
	return end();
}
