// SPDX-License-Identifier: Apache-2.0
/*
 * A runner without a VM: what tests put in a guest's place (tests/support/null_slot.py).
 *
 *	null_vm REGION-FD LANE-OFFSET AREA-WORDS AREA-OFFSET... [noop | nothing]
 *
 * It takes cases from the lane as guest/agent/kcov-runner.c does. "noop" covers one block, and "nothing" none. Otherwise
 * the first area gets a PC for each byte of the case that continues "KCOV", the second one PC for
 * each byte after that, and the byte after KCOV decides (a case that begins with "-" covers none):
 *
 *	!	the harness dies of SIGABRT
 *	?	the harness never ends
 *	x	the harness exits with 1
 *	^	the machine dies
 *	#	words that no honest runner writes
 *	*	the target counts a fault, in the first word of the region
 */
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lane.h"

#define BLOCK(number)	(0xffffffff81000000ULL + 16 * (uint64_t)(number))
#define SPIN		20000

static struct lane *lane;
static uint64_t *area[LANE_MOST_AREAS];
static uint64_t area_words;
static uint64_t *target_faults;

static void store(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static void cover(int index, uint64_t pc)
{
	uint64_t count = area[index][0];

	if (count + 1 < area_words) {
		area[index][count + 1] = pc;
		area[index][0] = count + 1;
	}
}

static uint64_t run(const uint8_t *input, uint64_t length)
{
	static const char magic[] = "KCOV";
	uint64_t i;

	if (length && input[0] == '-')
		return 0;
	cover(0, BLOCK(0));
	for (i = 0; i < 4; i++) {
		if (i >= length || input[i] != (uint8_t)magic[i])
			return 0;
		cover(0, BLOCK(1 + i));
	}
	for (; i < length && i < 1000; i++)
		cover(1, BLOCK(100 + input[i] / 16));
	if (length == 4)
		return 0;
	switch (input[4]) {
	case '!':
		return SIGABRT;
	case '?':
		for (;;)
			pause();
	case 'x':
		return 1 << 8;
	case '^':
		_exit(0);
	case '*':
		store(target_faults, *target_faults + 1);
		return 0;
	case '#':
		lane->areas_used = ~0ULL;
		memset(lane->area_counts, 0xff, sizeof(lane->area_counts));
		return 0xdeadbeefdeadbe7fULL;
	}
	return 0;
}

int main(int argc, char **argv)
{
	int noop = argc > 1 && !strcmp(argv[argc - 1], "noop");
	int nothing = argc > 1 && !strcmp(argv[argc - 1], "nothing");
	struct timespec nap = { .tv_nsec = 50000 };
	uint64_t done, areas = 0, looks = 0;
	struct stat state;
	char *region;
	int i;

	if (argc < 5 || fstat(atoi(argv[1]), &state))
		return 2;
	region = mmap(NULL, (size_t)state.st_size, PROT_READ | PROT_WRITE, MAP_SHARED,
		      atoi(argv[1]), 0);
	if (region == MAP_FAILED)
		return 2;
	target_faults = (uint64_t *)region;
	lane = (struct lane *)(region + strtoull(argv[2], NULL, 10));
	area_words = strtoull(argv[3], NULL, 10);
	for (i = 4; i < argc - (noop || nothing); i++)
		area[areas++] = (uint64_t *)(region + strtoull(argv[i], NULL, 10));
	done = __atomic_load_n(&lane->case_number, __ATOMIC_ACQUIRE);
	store(&lane->ready, lane->generation);
	for (;;) {
		uint64_t number = __atomic_load_n(&lane->case_number, __ATOMIC_ACQUIRE), status = 0;

		if (number == done) {
			if (++looks > SPIN)
				nanosleep(&nap, NULL);
			else if (looks % 32)
				__builtin_ia32_pause();
			else
				sched_yield();
			continue;
		}
		looks = 0;
		store(&lane->started, number);
		for (i = 0; i < (int)areas; i++)
			area[i][0] = 0;
		lane->areas_used = areas;
		if (noop)
			cover(0, BLOCK(0));
		else if (!nothing)
			status = run((uint8_t *)lane + LANE_INPUT_OFFSET, lane->length);
		for (i = 0; i < (int)areas && status != 0xdeadbeefdeadbe7fULL; i++)
			lane->area_counts[i] = area[i][0];
		lane->status = status;
		store(&lane->done, number);
		done = number;
	}
}
