// SPDX-License-Identifier: Apache-2.0
/* 64 instances at once, each with its own area, traced by its own thread. */
#include "markers.h"

#define INSTANCES 64
#define ROUNDS 20

static struct kcov kcovs[INSTANCES];
static int enabled, finished, errors;

static void *work(void *argument)
{
	struct kcov *kcov = argument;
	int kind = (kcov - kcovs) % KINDS;

	if (kcov_enable(kcov))
		__atomic_add_fetch(&errors, 1, __ATOMIC_RELAXED);
	/* All are enabled before the first makes its calls, and until the last has made them. */
	__atomic_add_fetch(&enabled, 1, __ATOMIC_RELEASE);
	while (__atomic_load_n(&enabled, __ATOMIC_ACQUIRE) < INSTANCES)
		usleep(1000);
	reset(kcov);
	for (int i = 0; i < ROUNDS; i++)
		marker_call(kind);
	__atomic_add_fetch(&finished, 1, __ATOMIC_RELEASE);
	while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < INSTANCES)
		usleep(1000);
	if (kcov_disable(kcov))
		__atomic_add_fetch(&errors, 1, __ATOMIC_RELAXED);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t ids[INSTANCES];
	int distinct = 0, own = 0, foreign = 0;

	begin(argc, argv);
	learn_markers();
	for (int i = 0; i < INSTANCES; i++) {
		kcovs[i] = kcov_new(4 * WORDS);
		kcovs[i].area[kcovs[i].words - 1] = i + 1;
	}
	for (int i = 0; i < INSTANCES; i++)
		distinct += kcovs[i].area[kcovs[i].words - 1] == (uint64_t)i + 1;
	is(distinct, INSTANCES, "64 areas are 64 places");
	for (int i = 0; i < INSTANCES; i++)
		ids[i] = thread(work, &kcovs[i]);
	for (int i = 0; i < INSTANCES; i++)
		pthread_join(ids[i], NULL);
	is(errors, 0, "64 threads enable, trace and disable at once");
	for (int i = 0; i < INSTANCES; i++) {
		own += holds(&kcovs[i], markers[i % KINDS]);
		for (int kind = 0; kind < KINDS; kind++)
			foreign += kind != i % KINDS && holds(&kcovs[i], markers[kind]);
	}
	is(own, INSTANCES, "each area has the PCs of its own thread's calls");
	is(foreign, 0, "and none of another's");
	for (int i = 0; i < INSTANCES; i++)
		kcov_free(&kcovs[i]);
	return end();
}
