// SPDX-License-Identifier: Apache-2.0
/* MAP_PRIVATE: shows the area until it is written to, and is nobody else's from then on. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov;
	volatile uint64_t *private;
	uint64_t before;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	private = mmap(NULL, kcov_bytes(&kcov), PROT_READ | PROT_WRITE, MAP_PRIVATE, kcov.fd, 0);
	ok(private != MAP_FAILED, "MAP_PRIVATE is taken");
	is(kcov_enable(&kcov), 0, "ENABLE");
	reset(&kcov);
	call();
	before = count(&kcov);
	ok(before > 0 && private[0] == before, "it shows the PCs");
	private[WORDS - 1] = 5;
	ok(private[WORDS - 1] == 5 && kcov.area[WORDS - 1] == 0, "a write stays private");
	private[0] = 0;
	call();
	ok(count(&kcov) > before, "a private word 0 is not the device's");
	ok(private[0] == 0, "and the page that was written shows no more PCs");
	is(kcov_disable(&kcov), 0, "DISABLE");
	munmap((void *)private, kcov_bytes(&kcov));
	kcov_free(&kcov);
	return end();
}
