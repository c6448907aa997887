// SPDX-License-Identifier: Apache-2.0
/* The same instance for one owner after the other; a new instance is zero whoever was before. */
#include "kcov_test.h"

#define INSTANCES 16

int main(int argc, char **argv)
{
	struct kcov kcovs[INSTANCES], kcov;
	uint64_t dirty = 0, given;
	pid_t pid;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	kcov.area[WORDS - 1] = 3;
	pid = child();
	if (!pid) {
		if (kcov_enable(&kcov))
			_exit(1);
		reset(&kcov);
		calls(10);
		_exit(0);
	}
	is(wait_for(pid), 0, "a child enables, traces and exits");
	given = count(&kcov);
	ok(given >= 10 && kcov.area[given], "what it left stays readable");
	is(kcov.area[WORDS - 1], 3, "and what its parent wrote");
	is(kcov_enable(&kcov), 0, "another enables the instance");
	ok(count(&kcov) >= given, "and finds word 0 where it was");
	ok(traces(&kcov), "and traces");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);

	for (int round = 0; round < 3; round++) {
		for (int i = 0; i < INSTANCES; i++) {
			kcovs[i] = kcov_new(WORDS);
			for (uint64_t j = 0; j < WORDS; j++)
				dirty += kcovs[i].area[j] != 0;
			memset(kcovs[i].area, 0xff, kcov_bytes(&kcovs[i]));
		}
		for (int i = 0; i < INSTANCES; i++)
			kcov_free(&kcovs[i]);
	}
	is(dirty, 0, "new instances are zero, where others have written everywhere");
	return end();
}
