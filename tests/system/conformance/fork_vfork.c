// SPDX-License-Identifier: Apache-2.0
/* A child, made by fork, vfork or clone, has the mapping but no kcov. */
#include "markers.h"

#include <sched.h>

static struct kcov kcov;
static char stack[64 << 10] __attribute__((aligned(16)));

/* In a child: 0 if it is as it should be. */
static int untraced_child(void *unused)
{
	(void)unused;
	for (int i = 0; i < 100; i++)
		marker_call(2);
	return kcov_disable(&kcov) == EINVAL ? 0 : 2;
}

/* Opening a gate is a call too, and its return may be under way: wait until the child is at rest. */
static void wait_for_rest(pid_t pid)
{
	char path[64], text[256];
	const char *state;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	do {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t size = read(fd, text, sizeof(text) - 1);

		close(fd);
		if (size <= 0)
			bail("%s", path);
		text[size] = 0;
		state = strrchr(text, ')');
	} while (!state || state[2] != 'S');
}

/* The parent is traced, and its area has nothing of the child's. */
static int parent_alone(void)
{
	return !holds(&kcov, markers[2]) && traces(&kcov);
}

int main(int argc, char **argv)
{
	struct kcov own;
	struct gate gate = gate_new();
	pid_t pid;

	begin(argc, argv);
	learn_markers();
	kcov = kcov_new(WORDS);
	own = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");

	pid = child();
	if (!pid)
		_exit(untraced_child(NULL));
	is(wait_for(pid), 0, "fork: its parent's instance is not the child's to disable");
	ok(parent_alone(), "the parent is traced, the child is not");

	pid = vfork();
	if (!pid)
		_exit(untraced_child(NULL));
	is(wait_for(pid), 0, "vfork: nor there");
	ok(parent_alone(), "the parent is traced, the child is not");

	pid = clone(untraced_child, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL);
	is(wait_for(pid), 0, "clone(CLONE_VM): nor there");
	ok(parent_alone(), "the parent is traced, the child is not");

	pid = child();
	if (!pid) {
		int good = kcov_enable(&kcov) == EINVAL && !kcov_enable(&own) && traces(&own);

		gate_open(&gate);
		while (good)
			pause();
		_exit(1);
	}
	gate_wait(&gate);
	wait_for_rest(pid);
	is(kcov_enable(&own), EINVAL, "a child of a task that traces may trace through another");
	ok(traces(&kcov), "while the parent is traced");
	reset(&own);
	calls(50);
	is(count(&own), 0, "each into its own area");
	kill(pid, SIGKILL);
	is(wait_for(pid), -SIGKILL, "the child is killed");
	ok(traces(&kcov), "its end is not the parent's");
	is(kcov_disable(&kcov), 0, "DISABLE");
	is(kcov_enable(&own), 0, "the child's instance is free");
	is(kcov_disable(&own), 0, "DISABLE");
	kcov_free(&own);
	kcov_free(&kcov);
	gate_free(&gate);
	return end();
}
