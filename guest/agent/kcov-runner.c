/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-runner: takes test cases from a lane (lane.h), runs a harness (harness.h) on them under kcov,
 * and says when each is done.
 *
 *	kcov-runner LANE NAME [ARGUMENT]...
 *
 * LANE is the lane's number, NAME a harness's. There are three processes:
 *
 *	starter		opens and maps the lane, loads the harness, waits for the watcher
 *	└ watcher	process 1 of a PID namespace, if the kernel has these. It starts the child,
 *			reports the status of one that dies, kills all that it leaves behind
 *	  └ child	runs the cases, one after another, in persistent mode
 *
 * The descriptors are opened once: an instance whose owner has died can be enabled again.
 */
#define _GNU_SOURCE
#include "lane.h"

#include "harness.h"
#include "kcov.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_FAILED = 125 };

/* While no case comes, the child sleeps so long: short at first, then less often. */
#define SHORT_SLEEP_NS 20000
#define LONG_SLEEP_NS 1000000
#define SHORT_SLEEPS 200
/* Looks at the lane between two looks at the clock. */
#define LOOKS 256
/* After so many cases stderr's file is emptied if it has more than STDERR_BYTES. */
#define STDERR_CASES 1024
#define STDERR_BYTES (1 << 20)

static const char *const devices[] = {
	"/sys/kernel/debug/kcov_bridge", /* where the kernel has a kcov of its own */
	"/sys/kernel/debug/kcov",
	"/dev/kcov",
};

static struct runner_harness *harnesses;
static struct lane *lane;
static unsigned int areas; /* trace areas */
static uint64_t area_words;
static int instances[LANE_MOST_AREAS + 1];
static volatile uint64_t *traces[LANE_MOST_AREAS + 1];
/* Bit by index: the area is in use. Of one child. */
static _Atomic uint32_t taken;
static _Atomic uint32_t used; /* the highest index in use so far */
static int errors = -1;       /* stderr of the child */
static int messages = 2;      /* stderr of the runner */
static uint8_t input[LANE_INPUT_BYTES];

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	dprintf(messages, "kcov-runner: ");
	vdprintf(messages, format, arguments);
	dprintf(messages, "\n");
	va_end(arguments);
}

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	dprintf(messages, "kcov-runner: ");
	vdprintf(messages, format, arguments);
	dprintf(messages, "\n");
	va_end(arguments);
	_exit(EXIT_FAILED);
}

void runner_register(struct runner_harness *harness)
{
	harness->next = harnesses;
	harnesses = harness;
}

/* ---- the lane ------------------------------------------------------------------------------ */

static int open_device(void)
{
	int error = ENOENT;

	for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++) {
		int fd = open(devices[i], O_RDWR | O_CLOEXEC);

		if (fd >= 0)
			return fd;
		if (errno != ENOENT)
			error = errno;
	}
	fail("there is no kcov device that can be opened: %s", strerror(error));
}

static void *open_area(uint64_t number, unsigned int index, size_t bytes)
{
	void *memory;

	instances[index] = open_device();
	if (ioctl(instances[index], KCOV_BRIDGE_LANE,
		  number | (unsigned long)index << KCOV_BRIDGE_LANE_SHIFT))
		fail("area %u of lane %#lx: %s", index, (unsigned long)number,
		     errno == ESRCH ? "there is no such lane" :
		     errno == EBUSY ? "it is in use" :
				      strerror(errno));
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, instances[index], 0);
	if (memory == MAP_FAILED)
		fail("area %u of lane %#lx cannot be mapped: %s", index, (unsigned long)number,
		     strerror(errno));
	return memory;
}

static void open_lane(const char *text)
{
	char *end;
	uint64_t number = strtoull(text, &end, 0);

	if (*end || end == text || number >> KCOV_BRIDGE_LANE_SHIFT)
		fail("%s is not the number of a lane", text);
	lane = open_area(number, 0, LANE_BYTES);
	if (lane->magic != LANE_MAGIC || lane->version != LANE_VERSION)
		fail("lane %s has version %lu, this runner has %d", text,
		     (unsigned long)lane->version, LANE_VERSION);
	areas = (unsigned int)lane->areas;
	area_words = lane->area_words;
	if (!areas || areas > LANE_MOST_AREAS || !area_words)
		fail("lane %s has %u trace areas of %lu words", text, areas,
		     (unsigned long)area_words);
	for (unsigned int i = 1; i <= areas; i++)
		traces[i] = open_area(number, i, area_words * sizeof(uint64_t));
}

/* ---- trace areas --------------------------------------------------------------------------- */

int runner_area_take(void)
{
	uint32_t now = atomic_load(&taken);
	unsigned int index;

	do {
		index = (unsigned int)__builtin_ctz(~now);
		if (index > areas)
			return -1;
	} while (!atomic_compare_exchange_weak(&taken, &now, now | 1U << index));
	/* It has what an earlier owner left; the first case of the new one starts at 0. */
	traces[index][0] = 0;
	for (uint32_t most = atomic_load(&used); most < index;)
		if (atomic_compare_exchange_weak(&used, &most, index))
			break;
	return (int)index;
}

int runner_area_enable(int index)
{
	return ioctl(instances[index], KCOV_ENABLE, KCOV_TRACE_PC) ? errno : 0;
}

int runner_area_disable(int index)
{
	return ioctl(instances[index], KCOV_DISABLE, 0) ? errno : 0;
}

int runner_area_descriptor(int index)
{
	return index > 0 ? instances[index] : -1;
}

void runner_area_give(int index)
{
	atomic_fetch_and(&taken, ~(1U << index));
}

int runner_thread_begin(void)
{
	int index = runner_area_take();

	if (index > 0 && runner_area_enable(index)) {
		runner_area_give(index);
		return -1;
	}
	return index;
}

void runner_thread_end(int index)
{
	if (index <= 0)
		return;
	runner_area_disable(index);
	runner_area_give(index);
}

/* ---- output -------------------------------------------------------------------------------- */

static uint8_t *output(void)
{
	return (uint8_t *)lane + LANE_OUTPUT_OFFSET;
}

void runner_output(const void *data, size_t length)
{
	uint64_t have = lane->output_length;

	if (have > LANE_OUTPUT_BYTES)
		return;
	if (length > LANE_OUTPUT_BYTES - have)
		length = LANE_OUTPUT_BYTES - have;
	memcpy(output() + have, data, length);
	lane->output_length = have + length;
}

void runner_keep(const void *data, size_t length)
{
	if (length > LANE_KEPT_BYTES)
		return;
	memcpy((uint8_t *)lane + LANE_KEPT_OFFSET, data, length);
	lane->keep = length;
}

const void *runner_kept(size_t *length)
{
	uint64_t kept = lane->kept ? lane->kept : lane->keep;

	*length = kept;
	return kept && kept <= LANE_KEPT_BYTES ? (uint8_t *)lane + LANE_KEPT_OFFSET : NULL;
}

/* Make the end of the child's stderr the output of the case, unless it has some of its own. */
static void take_errors(void)
{
	off_t size = lseek(errors, 0, SEEK_END);
	off_t start = size > LANE_OUTPUT_BYTES ? size - LANE_OUTPUT_BYTES : 0;
	size_t have = 0;

	if (lane->output_length || size <= 0)
		return;
	while (start + (off_t)have < size) {
		ssize_t got = pread(errors, output() + have, (size_t)(size - start) - have,
				    start + (off_t)have);

		if (got <= 0)
			break;
		have += (size_t)got;
	}
	lane->output_length = have;
}

int runner_error_descriptor(void)
{
	return errors;
}

static void empty_errors(off_t most)
{
	if (lseek(errors, 0, SEEK_END) > most && ftruncate(errors, 0) == 0)
		lseek(errors, 0, SEEK_SET);
}

/* ---- the child ----------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static uint64_t case_number(void)
{
	/* Pairs with the host's store, the last of a case. */
	return __atomic_load_n(&lane->case_number, __ATOMIC_ACQUIRE);
}

/*
 * Wait for another case than the last. At first it polls, for as long as the host says: a case that
 * follows at once is not kept waiting. No pause instruction: under TCG it leaves the translated
 * code and takes QEMU's lock.
 */
static uint64_t next_case(uint64_t last)
{
	uint64_t end = 0, number;
	unsigned int sleeps = 0;

	for (;;) {
		for (int i = 0; i < LOOKS; i++) {
			number = case_number();
			if (number != last)
				return number;
		}
		if (!end)
			end = now_ns() + lane->spin_ns;
		else if (now_ns() >= end)
			break;
	}
	while ((number = case_number()) == last) {
		struct timespec time = {
			.tv_nsec = sleeps++ < SHORT_SLEEPS ? SHORT_SLEEP_NS : LONG_SLEEP_NS
		};

		nanosleep(&time, NULL);
	}
	return number;
}

/* Let the child's own area get PCs, or comparisons. */
static void trace(uint64_t *mode, uint64_t wanted)
{
	if (*mode == wanted)
		return;
	if (*mode != UINT64_MAX && ioctl(instances[1], KCOV_DISABLE, 0))
		fail("KCOV_DISABLE: %s", strerror(errno));
	if (ioctl(instances[1], KCOV_ENABLE, wanted))
		fail("KCOV_ENABLE: %s%s", strerror(errno),
		     wanted == KCOV_TRACE_CMP ? ": no source has comparisons" : "");
	*mode = wanted;
}

static void run_case(const struct runner_harness *harness, uint64_t number)
{
	uint64_t flags = lane->flags, length = lane->length, begun = 0;
	unsigned int most = atomic_load(&used);
	int status;

	if (length > LANE_INPUT_BYTES)
		length = LANE_INPUT_BYTES;
	lane->output_length = 0;
	lane->started = number;
	/* Its page faults come before the trace begins. */
	memcpy(input, (uint8_t *)lane + LANE_INPUT_OFFSET, length);
	if (flags & LANE_TIMED)
		begun = now_ns();
	for (unsigned int i = 1; i <= most; i++)
		traces[i][0] = 0;
	atomic_signal_fence(memory_order_seq_cst);
	status = harness->run(input, length);
	atomic_signal_fence(memory_order_seq_cst);
	most = atomic_load(&used);
	for (unsigned int i = 1; i <= most; i++)
		lane->area_counts[i - 1] = traces[i][0];
	if (flags & LANE_TIMED)
		lane->ns = now_ns() - begun;
	if (status)
		take_errors();
	if (harness->clean)
		harness->clean();
	lane->areas_used = most;
	lane->status = (uint32_t)status;
	/* Pairs with the host's load. */
	__atomic_store_n(&lane->done, number, __ATOMIC_RELEASE);
}

__attribute__((noreturn)) static void child(const struct runner_harness *harness,
					    uint64_t generation)
{
	uint64_t last = lane->done, mode = UINT64_MAX;
	const struct rlimit no_core = { 0, 0 };

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* Sleeps as short as they are asked for. */
	prctl(PR_SET_TIMERSLACK, 1);
	setrlimit(RLIMIT_CORE, &no_core);
	signal(SIGPIPE, SIG_DFL);
	atomic_store(&taken, 3); /* the control area's, and this thread's */
	atomic_store(&used, 1);
	if (harness->begin && harness->begin())
		_exit(EXIT_FAILED);
	if (dup2(errors, 2) < 0)
		fail("stderr: %s", strerror(errno));
	trace(&mode, KCOV_TRACE_PC);
	__atomic_store_n(&lane->ready, generation, __ATOMIC_RELEASE);
	for (unsigned int count = 1;; count++) {
		uint64_t number = next_case(last);

		trace(&mode, lane->flags & LANE_COMPARISONS ? KCOV_TRACE_CMP : KCOV_TRACE_PC);
		run_case(harness, number);
		last = number;
		if (count % STDERR_CASES == 0)
			empty_errors(STDERR_BYTES);
	}
}

/* ---- the watcher --------------------------------------------------------------------------- */

/* Report that the child died in its case, if it was in one. */
static void report_death(int status)
{
	uint64_t started = __atomic_load_n(&lane->started, __ATOMIC_ACQUIRE);

	if (started == lane->done)
		return;
	take_errors();
	/* The child's own area; how many others it used died with it. */
	for (unsigned int i = 1; i <= areas; i++)
		lane->area_counts[i - 1] = traces[i][0];
	lane->areas_used = areas;
	lane->status = (uint32_t)status;
	__atomic_store_n(&lane->done, started, __ATOMIC_RELEASE);
}

/* Kill what the child left behind, and wait until it is gone. */
static void kill_the_rest(bool alone, pid_t child_pid)
{
	/* Process 1 of a namespace reaches all others in it, and nobody else. */
	kill(alone ? -1 : -child_pid, SIGKILL);
	/* Without a namespace some may have left the child's group: nobody waits for these. */
	while (waitpid(-1, NULL, alone ? 0 : WNOHANG) > 0 || (alone && errno == EINTR))
		;
}

__attribute__((noreturn)) static void watch(const struct runner_harness *harness, bool alone)
{
	uint64_t generation = lane->generation;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* Without a namespace orphans would be process 1's. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	for (uint64_t children = 1;; children++) {
		uint64_t done = lane->done;
		int status;
		pid_t pid;

		lane->children = children;
		pid = fork();
		if (pid < 0)
			fail("fork: %s", strerror(errno));
		if (pid == 0) {
			setpgid(0, 0);
			child(harness, generation);
		}
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
		kill_the_rest(alone, pid);
		if (lane->ready != generation || (lane->started == done && lane->done == done))
			fail("the harness %s did not get ready: status %#x", harness->name,
			     (unsigned int)status);
		report_death(status);
		empty_errors(0);
	}
}

/*
 * Start anew with addresses that are not random, and without rseq, by which each preemption shows
 * in the trace: so the same case covers the same.
 */
static void start_steady(char **argv)
{
	char path[PATH_MAX]; /* its own name, not "exe" */
	ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
	int now = personality(0xffffffff);

	if (length < 0 || now < 0 || now & ADDR_NO_RANDOMIZE || personality((unsigned long)now | ADDR_NO_RANDOMIZE) < 0)
		return;
	setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0", 0);
	path[length] = 0;
	execv(path, argv);
}

int main(int argc, char **argv)
{
	const struct runner_harness *harness;
	int status, null;
	pid_t watcher;
	bool alone;

	start_steady(argv);
	if (argc < 3)
		fail("usage: kcov-runner LANE NAME [ARGUMENT]...");
	for (harness = harnesses; harness && strcmp(harness->name, argv[2]); harness = harness->next)
		;
	if (!harness) {
		say("there is no harness %s, only:", argv[2]);
		for (harness = harnesses; harness; harness = harness->next)
			say("  %s", harness->name);
		return EXIT_FAILED;
	}
	messages = fcntl(2, F_DUPFD_CLOEXEC, 3);
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	errors = memfd_create("stderr", MFD_CLOEXEC);
	if (messages < 0 || null < 0 || errors < 0)
		fail("%s", strerror(errno));
	open_lane(argv[1]);
	if (harness->load && harness->load(argc - 2, argv + 2))
		return EXIT_FAILED;
	if (dup2(null, 0) < 0 || dup2(null, 1) < 0)
		fail("/dev/null: %s", strerror(errno));
	alone = unshare(CLONE_NEWPID) == 0;
	watcher = fork();
	if (watcher < 0)
		fail("fork: %s", strerror(errno));
	if (watcher == 0)
		watch(harness, alone);
	while (waitpid(watcher, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_FAILED;
}
