/* SPDX-License-Identifier: Apache-2.0 */
/* The coverage epoch, as the processes see it that carry connections of the guest. */
#ifndef EPOCH_H
#define EPOCH_H

#include <stdint.h>
#include <time.h>
#include <unistd.h>

/* NULL where nobody relies on it. */
static volatile uint64_t *epoch;

/* coverage_epoch_value() of bridge/device/coverage_epoch.py. */
static void change_epoch(void)
{
	struct timespec now;
	uint64_t ns;

	if (!epoch)
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
	__atomic_store_n(epoch, ns << 23 | (uint64_t)getpid() << 1 | 1, __ATOMIC_SEQ_CST);
}

#endif
