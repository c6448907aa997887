// SPDX-License-Identifier: Apache-2.0
/* Word 0 is the user's to set: PCs go where it says if that lies inside, else nowhere. */
#include "kcov_test.h"

#define MARK 0x5a5a5a5a5a5a5a5a

static struct kcov kcov, before, behind;

static void poison(struct kcov *which)
{
	for (uint64_t i = 1; i < which->words; i++)
		which->area[i] = MARK;
}

static int untouched(const struct kcov *which)
{
	for (uint64_t i = 1; i < which->words; i++)
		if (which->area[i] != MARK)
			return 0;
	return which->area[0] == 0;
}

/* How many words after word 0 are not as poison() left them. */
static uint64_t written(void)
{
	uint64_t n = 0;

	for (uint64_t i = 1; i < kcov.words; i++)
		n += kcov.area[i] != MARK;
	return n;
}

int main(int argc, char **argv)
{
	static const uint64_t inside[] = { 0, 1, 2, 511, 512, WORDS / 2, WORDS - 3, WORDS - 2 };
	static const uint64_t outside[] = {
		WORDS - 1, WORDS, WORDS + 1, 2 * WORDS, 1ULL << 29, 0x7fffffff, 0x80000000,
		0xffffffff, 1ULL << 32, (1ULL << 32) + 7, 1ULL << 60, 1ULL << 61, (1ULL << 61) + 1,
		1ULL << 63, 0xffffffff80000000, ~0ULL - 1,
	};
	const int insides = sizeof(inside) / sizeof(*inside);
	const int outsides = sizeof(outside) / sizeof(*outside);

	begin(argc, argv);
	before = kcov_new(WORDS);
	kcov = kcov_new(WORDS);
	behind = kcov_new(WORDS);
	poison(&before);
	poison(&behind);
	is(kcov_enable(&kcov), 0, "ENABLE");
	for (int i = 0; i < insides; i++) {
		uint64_t value = inside[i], now, n;

		poison(&kcov);
		set_count(&kcov, value);
		call();
		now = count(&kcov);
		n = written();
		ok(now > value && now <= WORDS - 1 && n == now - value &&
		   kcov.area[value + 1] != MARK && kcov.area[now] != MARK,
		   "word 0 set to %llu: PCs follow there and nowhere else", (unsigned long long)value);
	}
	for (int i = 0; i < outsides; i++) {
		poison(&kcov);
		set_count(&kcov, outside[i]);
		calls(3);
		ok(count(&kcov) == outside[i] && written() == 0,
		   "word 0 set to %#llx: nothing is written", (unsigned long long)outside[i]);
	}
	/* Linux adds 1 first, which makes 0 of it; what then stands in word 0 is any PC. */
	poison(&kcov);
	set_count(&kcov, ~0ULL);
	call();
	ok(1, "word 0 set to 2^64-1 is survived");
	ok(traces(&kcov), "word 0 set to 0 makes it good");
	ok(untouched(&before) && untouched(&behind), "nothing was written into others");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&before);
	kcov_free(&behind);
	kcov_free(&kcov);
	return end();
}
