/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a harness is to the runner (kcov-runner.c), and what the runner offers to it.
 *
 * A harness is a C file that is linked with kcov-runner.c and registers itself:
 *
 *	static int run(const uint8_t *data, size_t length) { ...; return 0; }
 *	RUNNER_HARNESS(mine) = { .name = "mine", .run = run };
 *
 * The runner is started as `kcov-runner LANE NAME ARGUMENT...`. Its first process loads the harness
 * and forks the child that runs the cases, again whenever a child has died. All processes that a
 * case leaves behind are killed when the child dies.
 */
#ifndef KCOV_BRIDGE_AGENT_HARNESS_H
#define KCOV_BRIDGE_AGENT_HARNESS_H

#include <stddef.h>
#include <stdint.h>

struct runner_harness {
	const char *name;
	/*
	 * In the first process, once, before any child: load files, check arguments (argv[0] is the
	 * name). No threads. Returns 0, or another value after a message on stderr: the runner ends.
	 * May be NULL.
	 */
	int (*load)(int argc, char **argv);
	/* In each child, before its first case and before it traces; as load. May be NULL. */
	int (*begin)(void);
	/*
	 * Runs one case. The data are a copy of the harness's own, valid until it returns. Returns
	 * 0, or a wait status as waitpid() gives it for a command that went wrong. A harness may
	 * also die of a signal or exit: the runner reports that and starts the next child.
	 */
	int (*run)(const uint8_t *data, size_t length);
	/* Tidies up after run() has returned; what it covers is no part of the case. May be NULL. */
	void (*clean)(void);
	struct runner_harness *next;
};

void runner_register(struct runner_harness *harness);

#define RUNNER_HARNESS(symbol)                                                                     \
	static struct runner_harness symbol;                                                       \
	__attribute__((constructor)) static void symbol##_register(void)                           \
	{                                                                                          \
		runner_register(&symbol);                                                          \
	}                                                                                          \
	static struct runner_harness symbol

/*
 * Trace areas. The thread that calls run() traces into the first one. A harness that works in
 * other threads or processes takes an area for each, which keeps what they cover apart and in
 * order. A thread that lives for many cases is better than one for each case: enabling costs two
 * requests to the host.
 */

/* Take a free area. Returns its index, or -1 if all are in use. */
int runner_area_take(void);
/* Let the calling thread trace into the area; also in a forked child, until it exits. 0 or errno. */
int runner_area_enable(int index);
/* End that. 0 or errno. */
int runner_area_disable(int index);
/* The descriptor of the area, for a program that enables it by itself; -1 without an area. */
int runner_area_descriptor(int index);
/* Give the area back; no thread traces into it. */
void runner_area_give(int index);

/* The same for a thread that traces from here to the end: take and enable; disable and give. */
int runner_thread_begin(void);
void runner_thread_end(int index);

/*
 * Append to the output of the present case, up to LANE_OUTPUT_BYTES. Without any, the output of a
 * case whose status is not 0 is the end of what the harness wrote to stderr.
 */
void runner_output(const void *data, size_t length);
/*
 * What begin() finds out at length and is the same in each life of the guest, it can keep: the
 * runners of a lane that start later get it. Both are for begin(); keep does nothing if it does not
 * fit. runner_kept returns NULL if nothing was kept.
 */
void runner_keep(const void *data, size_t length);
const void *runner_kept(size_t *length);
/* The file that is stderr in run(), for a process that begin() starts; there stderr is the runner's. */
int runner_error_descriptor(void);

#endif
