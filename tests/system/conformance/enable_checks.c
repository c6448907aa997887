// SPDX-License-Identifier: Apache-2.0
/* KCOV_ENABLE: what it refuses, and the order of its checks. */
#include "kcov_test.h"

struct other {
	struct kcov *kcov;
	int enable, enable_wrong, disable;
};

static void *ask(void *argument)
{
	struct other *other = argument;

	other->enable = kcov_enable(other->kcov);
	other->enable_wrong = control(other->kcov->fd, KCOV_ENABLE, 77);
	other->disable = kcov_disable(other->kcov);
	return NULL;
}

int main(int argc, char **argv)
{
	struct kcov kcov, second;
	struct other other = { 0 };
	int fd, error;

	begin(argc, argv);
	fd = kcov_open();
	is(control(fd, KCOV_ENABLE, KCOV_TRACE_PC), EINVAL, "before INIT_TRACE: EINVAL");
	is(control(fd, KCOV_ENABLE, 77), EINVAL, "whatever the mode");
	control(fd, KCOV_INIT_TRACE, WORDS);
	is(control(fd, KCOV_ENABLE, KCOV_TRACE_PC), gvisor ? EINVAL : 0,
	   gvisor ? "before mmap: EINVAL" : "before mmap: success");
	control(fd, KCOV_DISABLE, 0);
	close(fd);

	kcov = kcov_new(WORDS);
	is(control(kcov.fd, KCOV_ENABLE, 2), EINVAL, "mode 2 is EINVAL");
	is(control(kcov.fd, KCOV_ENABLE, 77), EINVAL, "mode 77 is EINVAL");
	is(control(kcov.fd, KCOV_ENABLE, ~0UL), EINVAL, "mode 2^64-1 is EINVAL");
	is(control(kcov.fd, KCOV_ENABLE, 1UL << 32), gvisor ? 0 : EINVAL,
	   gvisor ? "the low byte of the mode counts" : "all 64 bits of the mode count");
	if (gvisor) {
		control(kcov.fd, KCOV_DISABLE, 0);
		kcov_again(&kcov);
	}
	error = control(kcov.fd, KCOV_ENABLE, KCOV_TRACE_CMP);
	if (!error) {
		skip("TRACE_CMP", "this kernel traces comparisons");
		control(kcov.fd, KCOV_DISABLE, 0);
	} else {
		is(error, gvisor ? EOPNOTSUPP : ENOTSUPP,
		   gvisor ? "TRACE_CMP is EOPNOTSUPP" : "TRACE_CMP is 524");
	}
	is(kcov_enable(&kcov), 0, "a refusal leaves the instance as it was: ENABLE succeeds");

	is(kcov_enable(&kcov), EINVAL, "of an enabled instance by its owner: EINVAL");
	is(control(kcov.fd, KCOV_ENABLE, 77), EINVAL, "whatever the mode");
	other.kcov = &kcov;
	pthread_join(thread(ask, &other), NULL);
	is(other.enable, EINVAL, "of an enabled instance by another thread: EINVAL");
	is(other.enable_wrong, EINVAL, "whatever the mode");
	is(other.disable, EINVAL, "DISABLE by another thread: EINVAL");

	second = kcov_new(WORDS);
	is(kcov_enable(&second), EBUSY, "by a task that traces through another instance: EBUSY");
	is(control(second.fd, KCOV_ENABLE, 77), gvisor ? EINVAL : EBUSY,
	   gvisor ? "the mode is checked before that" : "that is checked before the mode");
	if (error)
		is(control(second.fd, KCOV_ENABLE, KCOV_TRACE_CMP), gvisor ? EOPNOTSUPP : EBUSY,
		   "also for TRACE_CMP");
	ok(traces(&kcov), "the first instance still traces");
	is(count(&second), 0, "the second one does not");
	is(kcov_disable(&kcov), 0, "DISABLE of the first");
	is(kcov_enable(&second), 0, "ENABLE of the second");
	ok(traces(&second), "which traces now");
	is(kcov_disable(&second), 0, "DISABLE");
	kcov_free(&second);
	kcov_free(&kcov);
	return end();
}
