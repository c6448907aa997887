// SPDX-License-Identifier: Apache-2.0
/* kcov belongs to a thread, not to a process; a thread's end gives the instance back. */
#include "markers.h"

#define ROUNDS 100

static struct kcov kcov, second;
static int go;

static void *make_calls(void *unused)
{
	for (int i = 0; i < 200; i++)
		marker_call(2);
	return unused;
}

static void *enable_both_kinds(void *errors)
{
	((int *)errors)[0] = kcov_enable(&second);
	((int *)errors)[1] = !traces(&second);
	((int *)errors)[2] = kcov_disable(&second);
	return NULL;
}

struct round {
	int disable, good;
};

static void *enable_and_end(void *argument)
{
	struct round *round = argument;

	round->good = !kcov_enable(&kcov) && traces(&kcov);
	if (round->disable)
		kcov_disable(&kcov);
	return NULL;
}

static void *be_around(void *unused)
{
	while (!__atomic_load_n(&go, __ATOMIC_ACQUIRE))
		marker_call(2);
	return unused;
}

int main(int argc, char **argv)
{
	int errors[3], good = 0;
	uint64_t before;
	pthread_t id;

	begin(argc, argv);
	learn_markers();
	kcov = kcov_new(WORDS);
	second = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE by the first thread");
	reset(&kcov);
	call();
	before = count(&kcov);
	id = thread(be_around, NULL);
	reset(&kcov);
	for (volatile int i = 0; i < 3000000; i++)
		;
	/* Linux records what runs in the owner's name when it was interrupted and goes on. */
	ok(!holds(&kcov, markers[2]),
	   "calls of another thread leave none of their PCs while the owner makes none");
	ok(before > 0, "the owner's do");
	__atomic_store_n(&go, 1, __ATOMIC_RELEASE);
	pthread_join(id, NULL);
	reset(&kcov);
	pthread_join(thread(make_calls, NULL), NULL);
	ok(count(&kcov) > 0 && !holds(&kcov, markers[2]),
	   "the calls of a new thread are not among those of its maker");
	pthread_join(thread(enable_both_kinds, errors), NULL);
	ok(!errors[0] && !errors[1] && !errors[2], "another thread traces through another instance");
	ok(traces(&kcov), "while the first is traced");
	is(kcov_disable(&kcov), 0, "DISABLE");
	for (int i = 0; i < ROUNDS; i++) {
		struct round round = { .disable = i & 1 };

		kcov_again(&kcov);
		pthread_join(thread(enable_and_end, &round), NULL);
		good += round.good;
	}
	is(good, ROUNDS, "a thread that was joined has freed its instance, DISABLE or not");
	kcov_free(&second);
	kcov_free(&kcov);
	return end();
}
