// SPDX-License-Identifier: Apache-2.0
/* Instances opened by a fork server, enabled by worker threads of its children, over and over. */
#include "kcov_test.h"

#define INSTANCES 6
#define CHILDREN 10

static struct kcov kcovs[INSTANCES];
static int wrong;

static void *work(void *argument)
{
	struct kcov *kcov = argument;

	if (kcov_enable(kcov) || !traces(kcov))
		__atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
	return NULL;
}

/* All its threads at once, then one after the other: each end frees the instance for the next. */
static void serve(int number)
{
	pthread_t ids[INSTANCES];

	for (int i = 0; i < INSTANCES; i++)
		ids[i] = thread(work, &kcovs[i]);
	for (int i = 0; i < INSTANCES; i++)
		pthread_join(ids[i], NULL);
	for (int i = 0; i < INSTANCES; i++) {
		pthread_join(thread(work, &kcovs[i]), NULL);
	}
	if (number & 1) {
		for (int i = 0; i < INSTANCES; i++)
			ids[i] = thread(work, &kcovs[i]);
		/* Some still at it. */
		raise(SIGKILL);
	}
	_exit(wrong);
}

int main(int argc, char **argv)
{
	int good = 0, idle = 0;

	begin(argc, argv);
	for (int i = 0; i < INSTANCES; i++)
		kcovs[i] = kcov_new(WORDS);
	for (int number = 0; number < CHILDREN; number++) {
		pid_t pid = child();

		if (!pid)
			serve(number);
		good += wait_for(pid) == (number & 1 ? -SIGKILL : 0);
	}
	is(good, CHILDREN, "each child's threads trace through the server's instances");
	for (int i = 0; i < INSTANCES; i++) {
		idle += !kcov_enable(&kcovs[i]) && traces(&kcovs[i]) && !kcov_disable(&kcovs[i]);
		kcov_free(&kcovs[i]);
	}
	is(idle, INSTANCES, "after the last child, each is the server's own to enable");
	return end();
}
