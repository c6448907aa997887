// SPDX-License-Identifier: Apache-2.0
/*
 * Ways to tell the bridge which blocks ran: native_designs BLOCKS NEW ROUNDS.
 *
 * Each has a callback for a block and a look of the bridge. In each round, and for each way in turn:
 * NEW blocks run for the first time since the last look, run again, and are looked at; then
 * 100,000 runs of these blocks come before a look. It prints for each way the medians: nanoseconds of a
 * first and of a repeated run, microseconds of a look, and of a look after many runs, and how many runs
 * of the latter were lost. All on one thread, so that the transfer of cache lines between cores is in
 * none of them. The first way is the run time and the reader themselves, the others are the least that
 * the way needs: they have no thread's number and no answer to programs that die in between.
 */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST (1u << 20)
#define MANY 100000
#define RING (1u << 16)
#define LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define EXCHANGE(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)

struct kbn_reader;
struct kbn_reader *kbn_open(int fd, const char *epoch, uint64_t offset, const char *handles);
void kbn_place(struct kbn_reader *reader, uint32_t first, uint32_t count, uint64_t first_pc,
	       const int32_t *slots);
long kbn_drain(struct kbn_reader *reader, uint64_t *out, size_t room, int force, int all);
void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop);
void __sanitizer_cov_trace_pc_guard(uint32_t *guard);

static uint32_t blocks;
static uint32_t guards[MOST], armed_guards[MOST];
static uint64_t out[MOST];

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* The doorbell that every way needs: the guest asks if it is set. */
static uint64_t *bell;

static void ring_bell(void)
{
	struct timespec time;

	if (LOAD(bell))
		return;
	clock_gettime(CLOCK_MONOTONIC, &time);
	EXCHANGE(bell, (uint64_t)time.tv_nsec | 1);
}

static void *shared_memory(size_t bytes)
{
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (map == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	return map;
}

/* ---- a byte for each block, a byte for each 64, and a word: what is built */

static struct kbn_reader *reader;

static void levels_begin(void)
{
	char path[64];
	int fd = memfd_create("native-designs", MFD_ALLOW_SEALING);

	reader = fd < 0 ? NULL : kbn_open(fd, "", 0, "");
	if (!reader) {
		perror("kbn_open");
		exit(1);
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	setenv("KCOV_BRIDGE_NATIVE", path, 1);
	__sanitizer_cov_trace_pc_guard_init(guards, guards + blocks);
	if (!guards[0]) {
		fputs("the run time did not attach\n", stderr);
		exit(1);
	}
	kbn_place(reader, guards[0], blocks, 1ull << 32, NULL);
}

static void levels_run(uint32_t block)
{
	__sanitizer_cov_trace_pc_guard(&guards[block]);
}

static long levels_look(void)
{
	return kbn_drain(reader, out, MOST, 0, 0);
}

/* ---- guards that are disarmed by their first run, and armed by the bridge in the process */

static uint32_t *new_blocks, *new_count;

static void disarmed_begin(void)
{
	uint32_t i;

	for (i = 0; i < blocks; i++)
		armed_guards[i] = i + 1;
	new_blocks = shared_memory(sizeof(*new_blocks) * MOST);
	new_count = shared_memory(4096);
}

static void __attribute__((noinline)) disarmed_run(uint32_t block)
{
	uint32_t guard = LOAD(&armed_guards[block]);

	if (__builtin_expect(!guard, 1))
		return;
	guard = EXCHANGE(&armed_guards[block], 0);
	if (!guard)
		return;
	__atomic_store_n(&new_blocks[__atomic_fetch_add(new_count, 1, __ATOMIC_SEQ_CST)], guard,
			 __ATOMIC_RELEASE);
	ring_bell();
}

static long disarmed_look(void)
{
	static struct iovec to[1024];
	uint32_t count, at, i;

	if (!LOAD(bell))
		return 0;
	EXCHANGE(bell, 0);
	count = EXCHANGE(new_count, 0);
	for (at = 0; at < count; at += i) {
		struct iovec from;

		for (i = 0; i < 1024 && at + i < count; i++) {
			to[i].iov_base = &armed_guards[new_blocks[at + i] - 1];
			to[i].iov_len = sizeof(armed_guards[0]);
			out[at + i] = new_blocks[at + i];
		}
		from.iov_base = &new_blocks[at];
		from.iov_len = sizeof(new_blocks[0]) * i;
		if (process_vm_writev(getpid(), &from, 1, to, i, 0) < 0) {
			perror("process_vm_writev");
			exit(1);
		}
	}
	return count;
}

/* ---- the same, with what is armed in memory that both have */

static uint32_t *listed, *listed_count;
static uint8_t *disarmed;

static void list_begin(void)
{
	disarmed = shared_memory(MOST);
	listed = shared_memory(sizeof(*listed) * MOST);
	listed_count = shared_memory(4096);
}

static void __attribute__((noinline)) list_run(uint32_t block)
{
	uint32_t guard = LOAD(&guards[block]) - guards[0];

	if (__builtin_expect(LOAD(&disarmed[guard]), 1))
		return;
	if (EXCHANGE(&disarmed[guard], 1))
		return;
	__atomic_store_n(&listed[__atomic_fetch_add(listed_count, 1, __ATOMIC_SEQ_CST)], guard,
			 __ATOMIC_RELEASE);
	ring_bell();
}

static long list_look(void)
{
	uint32_t count, i;

	if (!LOAD(bell))
		return 0;
	EXCHANGE(bell, 0);
	count = EXCHANGE(listed_count, 0);
	for (i = 0; i < count; i++) {
		out[i] = listed[i];
		EXCHANGE(&disarmed[listed[i]], 0);
	}
	return count;
}

/* ---- a ring for each thread, which has each run */

static __thread uint32_t *ring;
static uint32_t *the_ring;
static uint64_t taken, lost;
static uint8_t *seen;

static void ring_begin(void)
{
	the_ring = ring = shared_memory(4096 + sizeof(*ring) * RING);
	seen = calloc(MOST, 1);
}

static void __attribute__((noinline)) ring_run(uint32_t block)
{
	uint64_t *head = (uint64_t *)ring, at = *head;

	(ring + 1024)[at % RING] = LOAD(&guards[block]);
	__atomic_store_n(head, at + 1, __ATOMIC_RELEASE);
	ring_bell();
}

static long ring_look(void)
{
	uint64_t head, at;
	long count = 0, i;

	if (!LOAD(bell))
		return 0;
	EXCHANGE(bell, 0);
	head = __atomic_load_n((uint64_t *)the_ring, __ATOMIC_ACQUIRE);
	if (head - taken > RING) {
		lost += head - taken - RING;
		taken = head - RING;
	}
	for (at = taken; at < head; at++) {
		uint32_t block = (the_ring + 1024)[at % RING] - guards[0];

		if (!seen[block]) {
			seen[block] = 1;
			out[count++] = block;
		}
	}
	for (i = 0; i < count; i++)
		seen[out[i]] = 0;
	taken = head;
	return count;
}

/* ---- a byte for each block, all of which the bridge reads, 64 at a time */

static uint8_t *counters;

static void scan_begin(void)
{
	counters = shared_memory(MOST);
}

static void __attribute__((noinline)) scan_run(uint32_t block)
{
	uint32_t guard = LOAD(&guards[block]) - guards[0];

	if (LOAD(&counters[guard]))
		return;
	__atomic_store_n(&counters[guard], 1, __ATOMIC_SEQ_CST);
	ring_bell();
}

static long scan_look(void)
{
	long count = 0;
	uint32_t at, i;

	if (!LOAD(bell))
		return 0;
	EXCHANGE(bell, 0);
	for (at = 0; at < blocks; at += 64) {
		const __m128i *line = (const __m128i *)(counters + at);
		__m128i any = _mm_or_si128(
			_mm_or_si128(_mm_load_si128(line), _mm_load_si128(line + 1)),
			_mm_or_si128(_mm_load_si128(line + 2), _mm_load_si128(line + 3)));

		if (_mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff)
			continue;
		for (i = at; i < at + 64; i++)
			if (LOAD(&counters[i]) && EXCHANGE(&counters[i], 0))
				out[count++] = i;
	}
	return count;
}

/* ---- */

static const struct design {
	const char *name;
	void (*begin)(void);
	void (*run)(uint32_t block);
	long (*look)(void);
} designs[] = {
	{"summary over bytes (ours)", levels_begin, levels_run, levels_look},
	{"disarmed in the process", disarmed_begin, disarmed_run, disarmed_look},
	{"disarmed, with a list", list_begin, list_run, list_look},
	{"ring for each thread", ring_begin, ring_run, ring_look},
	{"bytes without a summary", scan_begin, scan_run, scan_look},
};

#define DESIGNS (sizeof(designs) / sizeof(designs[0]))
#define MOST_ROUNDS 10000

enum { FIRST, REPEATED, LOOK, LOOK_AFTER_MANY, FIGURES };

static double figures[DESIGNS][FIGURES][MOST_ROUNDS];

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

static uint32_t order[MOST];

/* Run the NEW blocks of ORDER in turn, COUNT runs in all; return the nanoseconds. */
static double run_blocks(const struct design *design, uint32_t new, uint32_t count)
{
	double begin = now();
	uint32_t at = 0, i;

	for (i = 0; i < count; i++) {
		design->run(order[at]);
		if (++at == new)
			at = 0;
	}
	return now() - begin;
}

static void expect(const struct design *design, long got, uint32_t wanted)
{
	if (got == (long)wanted)
		return;
	fprintf(stderr, "%s: a look found %ld blocks, not %u\n", design->name, got, wanted);
	exit(1);
}

static void measure(const struct design *design, double (*figure)[MOST_ROUNDS], uint32_t new,
		    unsigned int round)
{
	double begin;
	long got;

	if (new)
		figure[FIRST][round] = run_blocks(design, new, new) / new;
	begin = now();
	got = design->look();
	figure[LOOK][round] = (now() - begin) / 1000;
	expect(design, got, new);
	if (!new)
		return;
	figure[REPEATED][round] = run_blocks(design, new, MANY) / MANY;
	begin = now();
	got = design->look();
	figure[LOOK_AFTER_MANY][round] = (now() - begin) / 1000;
	expect(design, got, new);
}

int main(int argc, char **argv)
{
	uint32_t new = argc == 4 ? (uint32_t)strtoul(argv[2], NULL, 10) : 0, i;
	unsigned int rounds = argc == 4 ? (unsigned int)strtoul(argv[3], NULL, 10) : 0, round;
	size_t each, figure;

	blocks = argc == 4 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0;
	if (!blocks || blocks > MOST || !rounds || rounds > MOST_ROUNDS || new >= blocks) {
		fputs("usage: native_designs BLOCKS NEW ROUNDS\n", stderr);
		return 2;
	}
	bell = shared_memory(4096);
	for (each = 0; each < DESIGNS; each++) {
		designs[each].begin();
		/* All blocks once, as a program that has started; the ring loses most. */
		for (i = 0; i < blocks; i++)
			designs[each].run(i);
		designs[each].look();
	}
	lost = 0;
	for (round = 0; round < rounds; round++) {
		/* They lie apart, as those of different functions do. */
		for (i = 0; i < new; i++)
			order[i] = (uint32_t)(((uint64_t)round * 104729 + i * 7919ull) % blocks);
		for (each = 0; each < DESIGNS; each++)
			measure(&designs[each], figures[each], new, round);
	}
	for (each = 0; each < DESIGNS; each++) {
		printf("%s", designs[each].name);
		for (figure = 0; figure < FIGURES; figure++) {
			double *values = figures[each][figure];

			qsort(values, rounds, sizeof(*values), compare);
			printf("\t%.2f", values[rounds / 2]);
		}
		printf("\t%.0f\n", designs[each].look == ring_look ? (double)lost / rounds : 0.0);
	}
	return 0;
}
