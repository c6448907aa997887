// SPDX-License-Identifier: Apache-2.0
/* Another thread sets word 0 at any moment, to anything. */
#include "kcov_test.h"

#define CALLS 3000
#define MARK 0x5a5a5a5a5a5a5a5a

static struct kcov kcov, before, behind;
static int stop;

static void *scribble(void *unused)
{
	static const uint64_t values[] = {
		0, 1, WORDS - 2, WORDS - 1, WORDS, WORDS + 1, 0xffffffff, 1ULL << 61, 1ULL << 63, ~0ULL,
	};
	uint64_t x = 88172645463325252;

	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		set_count(&kcov, x & 16 ? x : values[x % (sizeof(values) / sizeof(*values))]);
	}
	return unused;
}

static int marked(const struct kcov *which)
{
	for (uint64_t i = 0; i < which->words; i++)
		if (which->area[i] != MARK)
			return 0;
	return 1;
}

int main(int argc, char **argv)
{
	int wrong = 0;
	pthread_t id;

	begin(argc, argv);
	before = kcov_new(WORDS);
	kcov = kcov_new(WORDS);
	behind = kcov_new(WORDS);
	for (uint64_t i = 0; i < WORDS; i++)
		before.area[i] = behind.area[i] = MARK;
	is(kcov_enable(&kcov), 0, "ENABLE");
	id = thread(scribble, NULL);
	for (int i = 0; i < CALLS; i++)
		wrong += syscall(SYS_close, -1) != -1 || errno != EBADF;
	__atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
	pthread_join(id, NULL);
	ok(!wrong, "every call of the owner ends as it should");
	ok(marked(&before) && marked(&behind), "nothing was written into others");
	ok(traces(&kcov), "word 0 set to 0 makes it good");
	is(kcov_disable(&kcov), 0, "DISABLE");
	ok(traces_not(&kcov), "and DISABLE is final");
	kcov_free(&before);
	kcov_free(&behind);
	kcov_free(&kcov);
	return end();
}
