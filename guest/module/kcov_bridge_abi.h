/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The shared region between the guest's kcov_bridge module and the host.
 *
 * bridge/device/abi.py describes it; tests/device/test_abi.py compares the two. Every field is a
 * little-endian 64-bit word that one aligned access reads or writes.
 */
#ifndef KCOV_BRIDGE_ABI_H
#define KCOV_BRIDGE_ABI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Proposed for <linux/kcov.h>. */
#ifndef KCOV_UNIQUE_ENABLE
#define KCOV_UNIQUE_ENABLE	_IOW('c', 103, unsigned long)
#endif
#ifndef KCOV_RESET_TRACE
#define KCOV_RESET_TRACE	_IO('c', 104)
#endif

/* kcov-bridge's own; argument: number of a stream of the host, perhaps with KCOV_BRIDGE_FOLLOW. */
#define KCOV_BRIDGE_STREAM	_IO('c', 0xe0)
/* The children of the calling thread trace into the stream as well. */
#define KCOV_BRIDGE_FOLLOW	(1ULL << 63)

/*
 * kcov-bridge's own, in place of KCOV_INIT_TRACE: the instance gets an area that the host has made.
 * Argument: number of a lane of the host, and the area's index in it << KCOV_BRIDGE_LANE_SHIFT.
 */
#define KCOV_BRIDGE_LANE	_IO('c', 0xe1)
#define KCOV_BRIDGE_LANE_SHIFT	32

/* kcov-bridge's own, on /dev/kcov_wire: connect to the endpoint with this port in the guest. */
#define KCOV_BRIDGE_WIRE	_IO('c', 0xe2)

#define KB_PCI_VENDOR_ID	0x1af4
#define KB_PCI_DEVICE_ID	0x1110

#define KB_MAGIC		0x47445242564f434bULL	/* "KCOVBRDG" */
#define KB_VERSION		12
#define KB_SLOTS		1024
#define KB_REQUESTS_OFFSET	4096
#define KB_RESPONSES_OFFSET	(KB_REQUESTS_OFFSET + KB_SLOTS * 64)
#define KB_PAYLOAD_OFFSET	(KB_RESPONSES_OFFSET + KB_SLOTS * 64)
#define KB_AREAS_OFFSET		(KB_PAYLOAD_OFFSET + 4096)
#define KB_KICK_SLOT_BITS	16

enum kb_host_state {
	KB_HOST_ASLEEP	= 0,
	KB_HOST_AWAKE	= 1,
};

enum kb_op {
	KB_OP_NONE	= 0,	/* refused; replaces a request that is abandoned */
	KB_OP_INIT	= 1,	/* arg0: size in words */
	KB_OP_MAP	= 2,	/* arg0: length, arg1: page offset, arg2: live mappings */
	KB_OP_ENABLE	= 3,	/* arg0: mode; arg1: the task's address */
	KB_OP_DISABLE	= 4,	/* arg0: the ioctl's argument; arg1: unreported */
	KB_OP_EXIT	= 5,	/* arg1: unreported */
	KB_OP_RELEASE	= 6,
	/*
	 * arg0: system call number; arg1: unreported, returns without one; arg2: coverage_position when
	 * the call began, 0 (all since the last request of this op) or KB_SINCE_NONE
	 */
	KB_OP_RETURN	= 7,
	KB_OP_RESET	= 8,	/* arg0: the ioctl's argument */
	KB_OP_UNIQUE	= 9,	/* arg0: words of the bitmap; arg1: the task's address */
	KB_OP_REMOTE	= 10,	/* arg0: mode, size << 32; arg1: handles or ~0; arg2: common */
	KB_OP_CLOSE	= 11,	/* arg1: unreported; error 0: the instance has no owner now */
	/* The next two come in the module's own slot, which belongs to no instance. */
	KB_OP_KERNEL	= 12,	/* payload: struct kb_kernel, cpus 0: its end; error 0: watched */
	KB_OP_MODULE	= 13,	/* arg0: 1 loaded, 0 gone; arg1: text, arg2: bytes; payload: name */
	/* From a thread with an instance of its own, without INIT and MAP. */
	KB_OP_STREAM	= 14,	/* arg0: number of the stream; arg1: the task's address */
	/* In the module's own slot. */
	KB_OP_UNTRACED	= 15,	/* arg0: number of the stream; arg1: threads not followed */
	/* From the owner. */
	KB_OP_CALLS	= 16,	/* the owner's log of calls is to be emptied */
	/* From an instance without an area. */
	KB_OP_LANE	= 17,	/* arg0: the ioctl's argument */
	KB_OP_WIRE	= 18,	/* arg0: the ioctl's argument; area_offset: struct kb_wire */
};

struct kb_header {
	/* Written once by the host. */
	__u64 magic;
	__u64 version;
	__u64 slots;
	__u64 requests_offset;
	__u64 responses_offset;
	__u64 areas_offset;
	__u64 region_bytes;
	__u64 host_peer;
	/* Written by the host. */
	__u64 host_epoch;
	__u64 host_state;
	__u64 pad0[6];
	/* Written by the guest. */
	__u64 kick;
	__u64 pad1[7];
	/* Written by the guest, for people. */
	__u64 guest_timeouts;
	__u64 guest_skipped;
	/* Threads that KB_OP_UNTRACED could not report because the host did not answer. */
	__u64 guest_untraced;
	__u64 pad2[5];
	/* Written by the host and its relays: see HeaderWord.COVERAGE_EPOCH in bridge/device/abi.py. */
	__u64 coverage_epoch;
	__u64 pad3[7];
	/* Written by the host: see HeaderWord.COVERAGE_POSITION. */
	__u64 coverage_position;
	__u64 pad4[7];
};

/* In arg2 of KB_OP_RETURN: the call reached no target, and gets no coverage. */
#define KB_SINCE_NONE	(~0ULL)

struct kb_request {
	__u64 seq;
	__u64 op;
	__u64 generation;
	__u64 task;
	__u64 arg0;
	__u64 arg1;
	__u64 arg2;
	/* Not part of the request: enum kb_hidden. */
	__u64 hidden;
};

/* Unless it is NO or EXIT_LATER, the owner runs the module's code, which is not recorded. */
enum kb_hidden {
	KB_HIDDEN_NO	= 0,
	KB_HIDDEN_YES	= 1,
	KB_HIDDEN_SEEN	= 2,	/* written by the plugin in QEMU once it watches the owner */
	/* The plugin writes NO once the work before user mode is done. */
	KB_HIDDEN_EXIT	= 3,
	/* As NO, until that work starts; the plugin writes EXIT then. */
	KB_HIDDEN_EXIT_LATER = 4,
};

struct kb_response {
	__u64 seq;
	__u64 error;		/* 0 or a positive errno */
	__u64 area_offset;
	__u64 appended;
	__u64 dropped;
	__u64 flags;		/* enum kb_answer */
	/*
	 * To an op that starts an owner: the shortest time in which a target can answer, so a shorter
	 * call that did not sleep reached none; 0: calls are not told apart.
	 */
	__u64 soonest_ns;
	__u64 pad;
};

enum kb_answer {
	KB_ANSWER_SILENT	= 1,	/* to an ENABLE: the host needs no RETURN of this owner */
	KB_ANSWER_CALLS		= 2,	/* to a STREAM: log calls; area_offset: struct kb_call_log */
};

/*
 * The log of an owner's system calls: a ring of records. Positions count words since the start; a
 * word's index in the ring is its position modulo ring_words, a power of two.
 */
#define KB_CALL_WORDS_BITS	16
#define KB_CALL_STRINGS		4	/* at most, in a record */
#define KB_CALL_STRING_BYTES	256	/* the longest string, with its NUL */
#define KB_CALL_MOST_WORDS	144	/* more than the longest record has */

struct kb_call_log {
	/* Written by the guest. */
	__u64 head;		/* the end of the last record */
	__u64 lost;		/* records that had no room */
	__u64 entered;		/* 1: the owner is in the call that is the record in call */
	__u64 pad0[5];
	/* Written by the host; the guest reads the last four once, when it joins the stream. */
	__u64 tail;		/* the end of the last record that the host has taken */
	__u64 ring_words;
	__u64 count_offset;	/* of the owner's area: its count, in the region ... */
	__u64 bitmap_offset;	/* ... and its bitmap, which the guest clears at each call */
	__u64 bitmap_words;	/* 0: the guest leaves the bitmap alone */
	__u64 pad1[3];
	/* Written by the guest. */
	__u64 call[KB_CALL_MOST_WORDS];
	__u64 ring[];
};

/* A record; the strings follow, each with its NUL, padded to whole words. */
struct kb_call {
	__u64 words;		/* of the record with its strings; enum kb_call_flags */
	__u64 number;
	__u64 result;
	__u64 entered;		/* nanoseconds of the monotonic clock */
	__u64 returned;
	__u64 count;		/* of the owner's area when the call was entered */
	__u64 arguments[6];
	__u64 command[2];	/* the thread's name, with NULs up to the end */
};

/* Above KB_CALL_WORDS_BITS. */
enum kb_call_flags {
	/* Bits 0 to 5: the argument's string follows. Bits 8 to 13: it was cut. */
	KB_CALL_CUT_SHIFT	= 8,
	KB_CALL_RETURNED	= 1 << 16,	/* result and returned are valid */
	KB_CALL_IA32		= 1 << 17,	/* a call of a 32-bit program; its own numbers */
	KB_CALL_REFUSED		= 1 << 18,	/* refused before it was entered: entered = returned */
};

#define KB_WIRE_VECTOR		1	/* of the doorbell, in both directions */
#define KB_WIRE_RING_BYTES	262144

enum kb_wire_end_kind {
	KB_WIRE_CLOSED	= 1,	/* the target has closed it; there may be data to read */
	KB_WIRE_RESET	= 2,	/* it is broken */
};

/*
 * A connection to an endpoint of the target: two rings. Positions count bytes since the connection
 * began; a byte's place in its ring is its position modulo KB_WIRE_RING_BYTES.
 */
struct kb_wire {
	/* Written by the guest. */
	__u64 guest_sent;	/* the end of what it has written */
	__u64 guest_taken;	/* the end of what it has read */
	__u64 guest_polls;	/* it polls host_sent, and needs no interrupt */
	__u64 guest_full;	/* it waits for room: interrupt when host_taken has moved */
	__u64 pad0[4];
	/* Written by the host. */
	__u64 host_sent;
	__u64 host_taken;
	__u64 host_full;	/* it waits for room: ring when guest_taken has moved */
	__u64 host_ended;	/* enum kb_wire_end_kind, or 0 */
	__u64 pad1[500];
	/* Rings. */
	__u8 to_host[KB_WIRE_RING_BYTES];
	__u8 to_guest[KB_WIRE_RING_BYTES];
};

#define KB_KERNEL_CPUS	64

/* Data about the kernel by which the host finds the current task. Addresses are the guest's. */
struct kb_kernel {
	__u64 cpus;
	__u64 syscall_entry;
	/* The 64 bytes with the marker, by which the plugin finds this kernel's memory. */
	__u64 marker;
	__u64 marker_physical;
	__u64 pad[4];
	/* By APIC id: physical addresses of per-CPU current_task and preempt_count; 0: no CPU. */
	struct {
		__u64 current_task;
		__u64 preempt_count;
	} cpu[KB_KERNEL_CPUS];
	/* The address of the handler of each vector in the interrupt descriptor table. */
	__u64 vectors[256];
};

#endif /* KCOV_BRIDGE_ABI_H */
