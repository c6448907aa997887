// SPDX-License-Identifier: Apache-2.0
/* mmap of an enabled instance: Linux allows it, gVisor does not. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov;
	uint64_t *again;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	ok(traces(&kcov), "PCs come");
	is(try_map(kcov.fd, kcov_bytes(&kcov), PROT_READ, MAP_SHARED, 0), gvisor ? EINVAL : 0,
	   gvisor ? "mmap is EINVAL" : "mmap succeeds");
	is(try_map(kcov.fd, PAGE, PROT_READ, MAP_SHARED, 0), EINVAL, "a wrong length is EINVAL");
	ok(traces(&kcov), "PCs still come");
	again = kcov_map(kcov.fd, kcov_bytes(&kcov), PROT_READ);
	if (!gvisor) {
		ok(again && again[0] == count(&kcov), "the new mapping shows them");
		munmap(again, kcov_bytes(&kcov));
	}
	is(kcov_disable(&kcov), 0, "DISABLE");
	is(try_map(kcov.fd, kcov_bytes(&kcov), PROT_READ, MAP_SHARED, 0), 0, "mmap succeeds");
	kcov_free(&kcov);
	return end();
}
