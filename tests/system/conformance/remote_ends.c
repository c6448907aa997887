// SPDX-License-Identifier: Apache-2.0
/* KCOV_REMOTE_ENABLE again by another process, after its owner has ended in any way. */
#include "kcov_test.h"

#define COMMON		7
#define BUS		3

static int remote_enable(const struct kcov *kcov)
{
	struct {
		struct kcov_remote_arg arg;
		uint64_t handles[1];
	} enable = {
		.arg = {
			.trace_mode = KCOV_TRACE_PC,
			.area_size = WORDS,
			.num_handles = 1,
			.common_handle = kcov_remote_handle(KCOV_SUBSYSTEM_COMMON, COMMON),
		},
		.handles = { kcov_remote_handle(KCOV_SUBSYSTEM_USB, BUS) },
	};

	return control(kcov->fd, KCOV_REMOTE_ENABLE, (unsigned long)&enable);
}

/* Enable in a child, which then waits to be killed, or ends. */
static pid_t start(const struct kcov *kcov, int ends, int *error)
{
	struct gate enabled = gate_new();
	uint8_t result;
	pid_t pid = child();

	if (!pid) {
		result = (uint8_t)remote_enable(kcov);
		if (write(enabled.fds[1], &result, 1) != 1)
			_exit(98);
		while (!ends)
			pause();
		_exit(0);
	}
	if (read(enabled.fds[0], &result, 1) != 1)
		bail("read");
	*error = result;
	gate_free(&enabled);
	return pid;
}

int main(int argc, char **argv)
{
	struct kcov first, second;
	int good = 0, error;
	pid_t pid;

	begin(argc, argv);
	first = kcov_new(WORDS);
	if (gvisor) {
		is(remote_enable(&first), ENOTTY, "REMOTE_ENABLE");
		kcov_free(&first);
		return end();
	}
	second = kcov_new(WORDS);
	pid = start(&first, 0, &error);
	is(error, 0, "REMOTE_ENABLE by a child");
	is(remote_enable(&first), EINVAL, "by another process meanwhile");
	is(remote_enable(&second), EEXIST, "of the same handles through another instance");
	kill(pid, SIGKILL);
	is(wait_for(pid), -SIGKILL, "the child is killed");
	is(remote_enable(&second), 0, "the handles are free at once, for another instance");
	is(kcov_disable(&second), 0, "DISABLE");
	for (int i = 0; i < 20; i++) {
		pid = start(&first, i & 1, &error);
		if (!(i & 1))
			kill(pid, SIGKILL);
		good += !error && wait_for(pid) == (i & 1 ? 0 : -SIGKILL);
	}
	is(good, 20, "the same instance by the next child, whether the last one ended or was killed");
	is(kcov_enable(&first), 0, "and without handles");
	ok(traces(&first), "where it traces the caller");
	is(kcov_disable(&first), 0, "DISABLE");
	kcov_free(&first);
	kcov_free(&second);
	return end();
}
