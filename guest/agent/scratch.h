/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What foreign code may do in a case, and how that ends with it: for harnesses that run some.
 *
 * The child gets a mount namespace in which the root file system is read-only and /tmp is a tmpfs of
 * its own, limited, empty in each case, and its working directory. All that it starts cannot have
 * more than SCRATCH_TASKS tasks, nor more than its part of the memory; the kernel kills it first
 * where memory is short. What a case leaves running is killed.
 */
#ifndef KCOV_BRIDGE_AGENT_SCRATCH_H
#define KCOV_BRIDGE_AGENT_SCRATCH_H

#include <stdbool.h>

#define SCRATCH_TASKS 512
#define SCRATCH_MEMORY_PERCENT 60

/* In begin(). Returns 0, or 1 after a message on stderr. */
int scratch_begin(void);
/*
 * In clean(). Ends the child if it cannot be as new otherwise. With `alone` the harness has no
 * processes of its own, so that all others are a case's.
 */
void scratch_clean(bool alone);

#endif
