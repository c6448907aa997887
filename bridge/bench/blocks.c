// SPDX-License-Identifier: Apache-2.0
/*
 * A library with a block of native code, which calls the run time as a compiler's code does. The process that
 * loads it is the program that is covered.
 */
#include <stdint.h>

void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop);
void __sanitizer_cov_trace_pc_guard(uint32_t *guard);

#define EXPORT __attribute__((visibility("default")))

static uint32_t guards[64];

/* Announce the blocks; return how many there are, or 0 if they are not covered. */
EXPORT int kb_blocks_start(void)
{
	__sanitizer_cov_trace_pc_guard_init(guards, guards + 64);
	return guards[0] ? 64 : 0;
}

/* Run a block. */
EXPORT void kb_blocks_run(void)
{
	__sanitizer_cov_trace_pc_guard(&guards[7]);
}
