// SPDX-License-Identifier: Apache-2.0
/* The PCs of each system call are in the area when it returns, after those already there. */
#include "kcov_test.h"

#define CALLS 1000

int main(int argc, char **argv)
{
	struct kcov kcov;
	uint64_t before, first, kept;
	int silent = 0, moved = 0, low = 0;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	ok(traces_not(&kcov), "no PC before ENABLE");
	set_count(&kcov, 5);
	is(kcov_enable(&kcov), 0, "ENABLE");
	ok(count(&kcov) >= 5, "ENABLE leaves word 0 alone");
	reset(&kcov);
	call();
	first = count(&kcov);
	ok(first > 0, "a system call leaves PCs");
	kept = kcov.area[1];
	/* On Linux an owner that is preempted leaves some as it comes back; not every time. */
	for (int tries = 0; tries < 100; tries++) {
		reset(&kcov);
		for (volatile int i = 0; i < 1000000; i++)
			;
		if (!count(&kcov))
			break;
	}
	is(count(&kcov), 0, "without a system call, none");
	reset(&kcov);
	for (int i = 0; i < CALLS && count(&kcov) < WORDS / 2; i++) {
		uint64_t last;

		before = count(&kcov);
		last = kcov.area[before];
		call();
		silent += count(&kcov) <= before;
		moved += before && kcov.area[before] != last;
	}
	ok(!silent, "each of many calls leaves its own");
	ok(!moved, "and leaves those before it where they are");
	is(kcov.area[1], kept, "the same call begins with the same PC");
	for (uint64_t i = 1; i <= count(&kcov); i++)
		low += kcov.area[i] < 0xffffffff80000000 || kcov.area[i] >= 0xffffffffff000000;
	ok(!low, "all are addresses of a kernel or its modules");
	reset(&kcov);
	call();
	ok(count(&kcov) > 0 && count(&kcov) <= 2 * first + 50, "word 0 set to 0 starts anew");
	reset(&kcov);
	syscall(-1);
	ok(count(&kcov) <= WORDS - 1, "a system call that does not exist is survived");
	ok(syscall(SYS_close, -1) == -1 && errno == EBADF, "one that fails gets its own errno");
	reset(&kcov);
	syscall(SYS_close, -1);
	ok(count(&kcov) > 0, "and leaves PCs");
	is(kcov_disable(&kcov), 0, "DISABLE");
	before = count(&kcov);
	calls(100);
	is(count(&kcov), before, "no PC after DISABLE");
	kcov_free(&kcov);
	return end();
}
