/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The interface of kcov, as documented in the kernel's dev-tools/kcov.rst, and the message that
 * kcov-exec and libkcovexec.so exchange.
 */
#ifndef KCOV_BRIDGE_AGENT_KCOV_H
#define KCOV_BRIDGE_AGENT_KCOV_H

#include <stdint.h>
#include <sys/ioctl.h>

#define KCOV_INIT_TRACE _IOR('c', 1, unsigned long) /* 0x80086301 */
#define KCOV_ENABLE _IO('c', 100)                   /* 0x6364 */
#define KCOV_DISABLE _IO('c', 101)                  /* 0x6365 */
#define KCOV_UNIQUE_ENABLE _IOW('c', 103, unsigned long) /* 0x40086367, proposed for Linux */
/* kcov-bridge's own: the argument is the number of a stream of the host, perhaps with the flag. */
#define KCOV_BRIDGE_STREAM _IO('c', 0xe0)
#define KCOV_BRIDGE_FOLLOW (1UL << 63) /* children of the calling thread as well */
/* kcov-bridge's own, in place of KCOV_INIT_TRACE: number of a lane, index of an area above it. */
#define KCOV_BRIDGE_LANE _IO('c', 0xe1)
#define KCOV_BRIDGE_LANE_SHIFT 32
/* kcov-bridge's own, on /dev/kcov_wire: connect to the target's endpoint with this port. */
#define KCOV_BRIDGE_WIRE _IO('c', 0xe2)
#define KCOV_TRACE_PC 0
#define KCOV_TRACE_CMP 1
#define KCOV_WORDS_PER_CMP 4 /* type, two operands, PC */

/*
 * Following (kcov-exec -f). The library connects to the abstract Unix socket (SOCK_SEQPACKET) that
 * FOLLOW_VARIABLE names, once for each new process image, forked child and thread:
 *
 *   library                                    kcov-exec
 *   HELLO   value = thread id, pid     ──▶
 *                                      ◀──     OFFER   with an initialised descriptor (SCM_RIGHTS),
 *                                                      value = words of the bitmap, or 0,
 *                                                      or FOLLOW_COMPARISONS
 *                                              or DECLINE: already traced, or value = errno
 *   ENABLED value = 0 or errno         ──▶     (the thread traces from here on)
 */
#define FOLLOW_VARIABLE "KCOV_EXEC_SOCKET"

enum follow_kind { FOLLOW_HELLO = 1, FOLLOW_OFFER, FOLLOW_DECLINE, FOLLOW_ENABLED };

/* Instead of a number of words: stands for KCOV_TRACE_CMP. */
#define FOLLOW_COMPARISONS (-1)

struct follow_message {
	int32_t kind;
	int32_t value;
	int32_t pid;
};

#endif
