// SPDX-License-Identifier: Apache-2.0
/*
 * The least that a host can do: a peer of the ivshmem device that acknowledges every request and
 * does nothing else. The floor below which no answer to a signal can be, on this machine.
 *
 *	floor REGION-FD BYTES BELL-FD AREA-OFFSET busy|asleep NANOSECONDS
 *
 * "busy" looks at the shared word all the time, "asleep" waits for the doorbell's eventfd. Each
 * answer takes NANOSECONDS longer than it has to. Runs until it is killed. Every number of the layout
 * comes from bridge/device/abi.py by floor.py.
 */
#include <err.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t *words;
static uint64_t area_offset;
static int64_t answer_ns;
static uint64_t answered[SLOTS];

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void serve(unsigned int slot)
{
	int64_t until = answer_ns ? now() + answer_ns : 0;
	uint64_t *request = words + REQUESTS + slot * SLOT_WORDS;
	uint64_t *response = words + RESPONSES + slot * SLOT_WORDS;
	uint64_t seq = __atomic_load_n(&request[REQUEST_SEQ], __ATOMIC_ACQUIRE);

	if (seq == answered[slot])
		return;
	answered[slot] = seq;
	while (until && now() < until)
		;
	if (request[REQUEST_OP] == OP_MAP)
		response[RESPONSE_AREA_OFFSET] = area_offset;
	response[RESPONSE_ERROR] = 0;
	response[RESPONSE_FLAGS] = 0;
	__atomic_store_n(&response[RESPONSE_SEQ], seq, __ATOMIC_RELEASE);
}

static void serve_all(void)
{
	for (unsigned int slot = 0; slot < SLOTS; slot++)
		serve(slot);
}

/* Answers what came between two values of the shared word. */
static void answer(uint64_t last, uint64_t kick)
{
	uint64_t slot = kick & ((1u << KICK_SLOT_BITS) - 1);

	if (kick >> KICK_SLOT_BITS == (last >> KICK_SLOT_BITS) + 1 && slot < SLOTS)
		serve((unsigned int)slot);
	else
		serve_all();
}

int main(int argc, char **argv)
{
	int asleep, bell;
	uint64_t last = 0, kick;

	if (argc != 7)
		errx(2, "usage: floor REGION-FD BYTES BELL-FD AREA-OFFSET busy|asleep NANOSECONDS");
	asleep = !strcmp(argv[5], "asleep");
	bell = atoi(argv[3]);
	answer_ns = atoll(argv[6]);
	area_offset = strtoull(argv[4], NULL, 10);
	words = mmap(NULL, strtoull(argv[2], NULL, 10), PROT_READ | PROT_WRITE, MAP_SHARED,
		     atoi(argv[1]), 0);
	if (words == MAP_FAILED)
		err(125, "mmap");
	/* What was asked before is answered already, but for what comes right now. */
	for (unsigned int slot = 0; slot < SLOTS; slot++)
		answered[slot] = words[RESPONSES + slot * SLOT_WORDS + RESPONSE_SEQ];
	__atomic_store_n(&words[HOST_STATE], asleep ? HOST_ASLEEP : HOST_AWAKE, __ATOMIC_SEQ_CST);
	serve_all();
	for (;;) {
		kick = __atomic_load_n(&words[KICK], __ATOMIC_ACQUIRE);
		if (kick != last) {
			answer(last, kick);
			last = kick;
		} else if (asleep) {
			struct pollfd events = { .fd = bell, .events = POLLIN };
			uint64_t rung;

			if (poll(&events, 1, -1) == 1 && read(bell, &rung, sizeof(rung)) < 0)
				continue;
		} else {
			__builtin_ia32_pause();
		}
	}
}
