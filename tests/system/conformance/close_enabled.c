// SPDX-License-Identifier: Apache-2.0
/* close while enabled: Linux' task keeps tracing, gVisor's instance is cleared. */
#include "kcov_test.h"

static struct kcov kcov;

static void *close_and_go_on(void *unused)
{
	int error = kcov_enable(&kcov), second;

	ok(!error && traces(&kcov), "a thread enables and traces");
	second = dup(kcov.fd);
	close(kcov.fd);
	ok(traces(&kcov), "one of two descriptors is closed: it keeps tracing");
	close(second);
	if (gvisor)
		ok(traces_not(&kcov), "the last descriptor is closed: no PC comes any more");
	else
		ok(traces(&kcov), "the last descriptor is closed: it keeps tracing");
	return unused;
}

int main(int argc, char **argv)
{
	struct kcov other;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	pthread_join(thread(close_and_go_on, NULL), NULL);
	ok(traces_not(&kcov), "the thread has ended: no PC comes any more");
	munmap(kcov.area, kcov_bytes(&kcov));

	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	close(kcov.fd);
	munmap(kcov.area, kcov_bytes(&kcov));
	calls(100);
	other = kcov_new(WORDS);
	ok(!other.area[0] && !other.area[1], "nothing of it is in a new instance");
	calls(100);
	ok(!other.area[0] && !other.area[1], "and nothing comes into it");
	/* Linux' task traces into the closed instance to its end. */
	is(kcov_enable(&other), gvisor ? 0 : EBUSY,
	   gvisor ? "the task may trace through another" : "the task still traces: EBUSY");
	kcov_disable(&other);
	kcov_free(&other);
	return end();
}
