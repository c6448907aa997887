// SPDX-License-Identifier: Apache-2.0
/* mmap again gives the same area; it stays while nothing maps it. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov;
	uint64_t *again, *readonly, nonzero = 0;
	size_t bytes;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	bytes = kcov_bytes(&kcov);
	for (uint64_t i = 0; i < WORDS; i++)
		nonzero += kcov.area[i] != 0;
	ok(!nonzero, "a new area is zero");
	again = kcov_map(kcov.fd, bytes, PROT_READ | PROT_WRITE);
	readonly = kcov_map(kcov.fd, bytes, PROT_READ);
	ok(again && again != kcov.area, "a second mapping");
	ok(!!readonly, "a third, read-only");
	kcov.area[WORDS - 1] = 77;
	ok(again[WORDS - 1] == 77 && readonly[WORDS - 1] == 77, "all show the same area");
	is(kcov_enable(&kcov), 0, "ENABLE");
	reset(&kcov);
	call();
	is(kcov_disable(&kcov), 0, "DISABLE");
	ok(count(&kcov) > 0, "PCs are in the first mapping");
	ok(again[0] == count(&kcov) && readonly[0] == count(&kcov), "and in the others");
	ok(again[1] == kcov.area[1] && readonly[1] == again[1], "the same PCs");
	munmap(again, bytes);
	ok(kcov.area[WORDS - 1] == 77, "one mapping less does not touch the others");
	kcov_free(&kcov);
	ok(readonly[WORDS - 1] == 77 && readonly[0] > 0, "the last one outlives the descriptor");
	munmap(readonly, bytes);

	kcov = kcov_new(WORDS);
	kcov.area[WORDS - 1] = 88;
	munmap(kcov.area, bytes);
	kcov.area = kcov_map(kcov.fd, bytes, PROT_READ | PROT_WRITE);
	ok(kcov.area && kcov.area[WORDS - 1] == 88, "after munmap of all it is there again");
	munmap(kcov.area, bytes);
	is(kcov_enable(&kcov), 0, "ENABLE of an area that nobody maps");
	call();
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov.area = kcov_map(kcov.fd, bytes, PROT_READ | PROT_WRITE);
	if (gvisor)
		is(kcov.area[0], 0, "gVisor drops the area at DISABLE: a new one is mapped");
	else
		ok(kcov.area[0] > 0, "its PCs are seen once it is mapped");
	kcov_free(&kcov);
	return end();
}
