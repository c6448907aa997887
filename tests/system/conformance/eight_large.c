// SPDX-License-Identifier: Apache-2.0
/* Eight instances of 512 Ki words, 4 MiB, enabled in eight threads. */
#include "markers.h"

#define WORDS_LARGE (512UL << 10)
#define ROUNDS 200

static struct kcov kcovs[KINDS];
static pthread_barrier_t barrier;
static int counts_wrong, errors;

static void *work(void *argument)
{
	struct kcov *kcov = argument;
	int kind = kcov - kcovs;

	if (kcov_enable(kcov))
		__atomic_add_fetch(&errors, 1, __ATOMIC_RELAXED);
	pthread_barrier_wait(&barrier);
	reset(kcov);
	for (int i = 0; i < ROUNDS; i++) {
		uint64_t before = count(kcov);

		marker_call(kind);
		if (count(kcov) <= before && count(kcov) < WORDS_LARGE - 1)
			__atomic_add_fetch(&counts_wrong, 1, __ATOMIC_RELAXED);
	}
	/* The far end of the area is its own too. */
	set_count(kcov, WORDS_LARGE - 10);
	for (int i = 0; i < 20; i++)
		marker_call(kind);
	if (count(kcov) != WORDS_LARGE - 1)
		__atomic_add_fetch(&counts_wrong, 1, __ATOMIC_RELAXED);
	if (kcov_disable(kcov))
		__atomic_add_fetch(&errors, 1, __ATOMIC_RELAXED);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t ids[KINDS];
	int own = 0, foreign = 0, ends = 0;

	begin(argc, argv);
	learn_markers();
	pthread_barrier_init(&barrier, NULL, KINDS);
	for (int i = 0; i < KINDS; i++)
		kcovs[i] = kcov_new(WORDS_LARGE);
	for (int i = 0; i < KINDS; i++)
		ids[i] = thread(work, &kcovs[i]);
	for (int i = 0; i < KINDS; i++)
		pthread_join(ids[i], NULL);
	is(errors, 0, "eight threads enable and disable at once");
	is(counts_wrong, 0, "each call of each leaves PCs in its own area, up to its end");
	for (int i = 0; i < KINDS; i++) {
		own += holds(&kcovs[i], markers[i]);
		ends += kcovs[i].area[WORDS_LARGE - 1] >> 31 == 0x1ffffffff;
		for (int kind = 0; kind < KINDS; kind++)
			foreign += kind != i && holds(&kcovs[i], markers[kind]);
	}
	is(own, KINDS, "each area has the PCs of its own thread's calls");
	is(ends, KINDS, "to the last word");
	is(foreign, 0, "and none of another's");
	for (int i = 0; i < KINDS; i++)
		kcov_free(&kcovs[i]);
	return end();
}
