// SPDX-License-Identifier: Apache-2.0
/* KCOV_DISABLE: whose it is, and what it leaves. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov, other;
	int fd, rounds;

	begin(argc, argv);
	fd = kcov_open();
	is(control(fd, KCOV_DISABLE, 0), EINVAL, "before INIT_TRACE: EINVAL");
	close(fd);
	kcov = kcov_new(WORDS);
	is(kcov_disable(&kcov), EINVAL, "before ENABLE: EINVAL");
	is(kcov_enable(&kcov), 0, "ENABLE");
	is(control(kcov.fd, KCOV_DISABLE, 1), EINVAL, "with an argument: EINVAL");
	is(control(kcov.fd, KCOV_DISABLE, 1UL << 32), EINVAL, "all 64 bits of it count");
	ok(traces(&kcov), "which changes nothing");
	other = kcov_new(WORDS);
	is(kcov_disable(&other), EINVAL, "of another instance than one's own: EINVAL");
	ok(traces(&kcov), "which changes nothing");
	{
		pid_t pid = child();

		if (!pid)
			_exit(kcov_disable(&kcov));
		is(wait_for(pid), EINVAL, "by a child of the owner: EINVAL");
	}
	ok(traces(&kcov), "which changes nothing");
	kcov.area[WORDS - 1] = 6;
	is(kcov_disable(&kcov), 0, "by the owner");
	ok(traces_not(&kcov), "no PC comes any more");
	is(kcov.area[WORDS - 1], 6, "what was mapped stays mapped");
	is(kcov_disable(&kcov), EINVAL, "again: EINVAL");
	if (gvisor) {
		is(kcov_enable(&kcov), EINVAL, "ENABLE needs an mmap again");
		kcov_again(&kcov);
		is(kcov.area[WORDS - 1], 0, "which is a new area, zero");
	}
	is(kcov_enable(&kcov), 0, "ENABLE again");
	ok(traces(&kcov), "traces again");
	is(kcov_disable(&kcov), 0, "DISABLE again");
	for (rounds = 0; rounds < 50; rounds++) {
		kcov_again(&kcov);
		if (kcov_enable(&kcov) || !traces(&kcov) || kcov_disable(&kcov) || !traces_not(&kcov))
			break;
	}
	is(rounds, 50, "50 rounds of ENABLE and DISABLE");
	kcov_free(&other);
	kcov_free(&kcov);
	return end();
}
