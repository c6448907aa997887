/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a program in native code may call in kcov-bridge's run time (libkcovbridge).
 *
 * A program need not call anything: it is compiled with -fsanitize-coverage, linked with the run
 * time, and covered when the bridge starts it. In all other runs the run time does nothing.
 */
#ifndef KCOV_BRIDGE_H
#define KCOV_BRIDGE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the layout of the memory that run time and bridge share. */
extern const uint32_t kcov_bridge_layout;

/*
 * What this thread runs between the two calls is work on behalf of a handle of KCOV_REMOTE_ENABLE:
 * it goes only to the instance that enabled the handle, and is in its area when
 * kcov_bridge_handle_end() returns. Pairs on one thread do not nest: the inner pair is ignored.
 */
void kcov_bridge_handle_begin(uint64_t handle);
void kcov_bridge_handle_end(void);

/*
 * From now on TAKE gets the PC of each block that this thread runs, instead of the bridge; NULL ends
 * that. It returns whether it recorded the block; no other area gets it. For a program that writes
 * areas itself, as QEMU does with the bridge's plugin, or that wants some work recorded for nobody.
 * Only blocks of trace-pc-guard. TAKE has to be built without coverage. Returns what took them before.
 */
typedef int (*kcov_bridge_taker)(uint64_t pc);
kcov_bridge_taker kcov_bridge_take_blocks(kcov_bridge_taker take);

#ifdef __cplusplus
}
#endif

#endif
