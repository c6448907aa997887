// SPDX-License-Identifier: Apache-2.0
/*
 * Gives cases to a runner through a lane, as fast as it takes them, and does nothing else: what an
 * execution costs without an engine. bridge/bench/executions.py compiles it with the layout of
 * bridge/fuzz/lane.py.
 *
 *	lane REGION BYTES LANE NUMBER COUNT LENGTH FLAGS SPIN
 *
 * REGION is the descriptor of the region of BYTES bytes, LANE the offset of the lane's control area,
 * NUMBER that of the first of COUNT cases, each of LENGTH bytes. Polls for SPIN ns for the end of a
 * case before it sleeps in between. Prints seconds, and the sum of the runner's own times in ns.
 */
#define _GNU_SOURCE
#include <err.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#define SLEEP_NS 20000
#define LOOKS 64
#define LIMIT_NS 60000000000U

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static void wait_for(const uint64_t *done, uint64_t number, uint64_t spin)
{
	const struct timespec sleep = { .tv_nsec = SLEEP_NS };
	uint64_t begun = 0, now;

	for (;;) {
		for (int i = 0; i < LOOKS; i++) {
			if (__atomic_load_n(done, __ATOMIC_ACQUIRE) == number)
				return;
			__builtin_ia32_pause();
		}
		now = now_ns();
		if (!begun)
			begun = now;
		if (now - begun > LIMIT_NS)
			errx(1, "case %lu does not end", (unsigned long)number);
		if (now - begun >= spin)
			nanosleep(&sleep, NULL);
	}
}

int main(int argc, char **argv)
{
	uint64_t value[8], begun, inside = 0, bad = 0;
	uint8_t *region;
	uint64_t *lane;

	if (argc != 9)
		errx(1, "eight numbers");
	for (int i = 0; i < 8; i++)
		value[i] = strtoull(argv[i + 1], NULL, 0);
	region = mmap(NULL, value[1], PROT_READ | PROT_WRITE, MAP_SHARED, (int)value[0], 0);
	if (region == MAP_FAILED)
		err(1, "the region");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_TIMERSLACK, 1);
	lane = (uint64_t *)(region + value[2]);
	memset((uint8_t *)lane + INPUT_OFFSET, 'x', value[5]);
	begun = now_ns();
	for (uint64_t i = 0; i < value[4]; i++) {
		uint64_t number = value[3] + i;

		lane[LENGTH] = value[5];
		lane[FLAGS] = value[6];
		__atomic_store_n(&lane[CASE_NUMBER], number, __ATOMIC_RELEASE);
		wait_for(&lane[DONE], number, value[7]);
		inside += lane[NS];
		bad += lane[STATUS] != 0;
	}
	printf("{\"seconds\": %.6f, \"inside_ns\": %lu, \"bad\": %lu}\n",
	       (double)(now_ns() - begun) / 1e9, (unsigned long)inside, (unsigned long)bad);
	return 0;
}
