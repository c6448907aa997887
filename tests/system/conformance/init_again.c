// SPDX-License-Identifier: Apache-2.0
/* KCOV_INIT_TRACE on an instance that has been used: EBUSY for good. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov, other;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	is(control(kcov.fd, KCOV_INIT_TRACE, WORDS), EBUSY, "mapped: EBUSY");
	is(kcov_enable(&kcov), 0, "ENABLE");
	is(control(kcov.fd, KCOV_INIT_TRACE, WORDS), EBUSY, "enabled: EBUSY");
	is(control(kcov.fd, KCOV_INIT_TRACE, 0), gvisor ? EBUSY : EINVAL,
	   "enabled, a wrong size: as before ENABLE");
	other = kcov_new(WORDS);
	ok(1, "another instance may be initialised and mapped by a task that traces");
	is(kcov_disable(&kcov), 0, "DISABLE");
	is(control(kcov.fd, KCOV_INIT_TRACE, WORDS), EBUSY, "after DISABLE: EBUSY");
	kcov_free(&other);
	kcov_free(&kcov);
	return end();
}
