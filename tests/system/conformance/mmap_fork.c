// SPDX-License-Identifier: Apache-2.0
/* Mappings and descriptors in a forked child. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov;
	struct gate gate;
	pid_t pid;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	kcov.area[100] = 1;
	pid = child();
	if (!pid) {
		uint64_t *own = kcov_map(kcov.fd, kcov_bytes(&kcov), PROT_READ | PROT_WRITE);

		if (kcov.area[100] != 1 || !own || own[100] != 1)
			_exit(1);
		own[101] = 2;
		kcov.area[102] = 3;
		_exit(0);
	}
	is(wait_for(pid), 0, "a child has its parent's mapping, and can map the descriptor itself");
	ok(kcov.area[101] == 2 && kcov.area[102] == 3, "both are the parent's area");

	gate = gate_new();
	pid = child();
	if (!pid) {
		/* Until the parent has let go of all it has. */
		gate_wait(&gate);
		_exit(kcov.area[102] != 3 || kcov_enable(&kcov) || !traces(&kcov));
	}
	kcov_free(&kcov);
	kcov = kcov_new(WORDS);
	ok(!kcov.area[101], "another instance gets another area");
	gate_open(&gate);
	is(wait_for(pid), 0, "a child keeps and uses what its parent has let go");
	ok(!kcov.area[0], "and writes nowhere else");
	kcov_free(&kcov);
	gate_free(&gate);
	return end();
}
