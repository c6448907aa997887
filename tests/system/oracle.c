// SPDX-License-Identifier: Apache-2.0
/*
 * A kernel's own kcov against what the bridge sees of the same system calls.
 *
 *	oracle OWN OTHER ADDRESSES CALLS [BUSY]
 *
 * OWN is the kernel's kcov device, OTHER the bridge's. ADDRESSES is a file of 64-bit little-endian
 * addresses: begin and end of __sanitizer_cov_trace_pc(), the same of a function whose PCs may stand
 * in OWN's area alone, then the addresses behind each call of the first. One
 * thread enables both and makes CALLS system calls of many kinds. After each it takes from OTHER's
 * area the PCs that are in ADDRESSES and follow on one of that function, which so has returned to
 * them; they must be those in OWN's, one by one. BUSY tasks run beside it.
 *
 * Prints "NAME VALUE" lines, and for the first differences where they are. The exit status is 0
 * also where there are some.
 */
#define _GNU_SOURCE
#include "calls.h"

#define WORDS		(1UL << 20)
#define TEXT		0xffffffff80000000ULL
#define TEXT_BYTES	(256UL << 20)
#define SHOWN		20

static uint64_t *own, *other;
static uint8_t *known;
static uint64_t tracer[2];
/* A function that runs on an interrupt's way out, when in_task() is true again: kcov's own fault. */
static uint64_t leak[2];
static uint64_t leaked;
/* ---- the two kcovs ------------------------------------------------------------------------- */

static void read_addresses(const char *path)
{
	FILE *file = fopen(path, "rb");
	uint64_t address;

	known = calloc(TEXT_BYTES / 8, 1);
	if (!file || !known || fread(tracer, 8, 2, file) != 2 || fread(leak, 8, 2, file) != 2)
		die(path);
	while (fread(&address, 8, 1, file) == 1)
		if (address - TEXT < TEXT_BYTES)
			known[(address - TEXT) / 8] |= 1 << address % 8;
	fclose(file);
}

/* What is compared of the other's, and where in its area each of them stands. */
static uint64_t *set_aside, *set_aside_at;

static uint64_t *reserve(void)
{
	uint64_t *words = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (words == MAP_FAILED || madvise(words, WORDS * 8, MADV_DONTFORK))
		die("memory");
	return words;
}

/* Answers whether they are the same. */
static bool compare(const char *name, uint64_t call, uint64_t n_own, uint64_t n_other)
{
	static int shown;
	uint64_t n = 0, leaks = 0, i;

	for (i = 1; i < n_other; i++)
		if (other[i + 1] - TEXT < TEXT_BYTES &&
		    known[(other[i + 1] - TEXT) / 8] >> other[i + 1] % 8 & 1 &&
		    other[i] >= tracer[0] && other[i] < tracer[1]) {
			set_aside_at[n] = i + 1;
			set_aside[n++] = other[i + 1];
		}
	for (i = 0; i < n_own; i++) {
		if (i < n && set_aside[i] == own[i + 1])
			continue;
		if (own[i + 1] < leak[0] || own[i + 1] >= leak[1])
			break;
		memmove(own + i + 1, own + i + 2, (n_own - i - 1) * 8);
		n_own--;
		i--;
		leaks++;
	}
	leaked += leaks > 0;
	if (i == n && i == n_own)
		return true;
	if (shown++ < SHOWN) {
		printf("difference %s call %lu own %lu other %lu at %lu:", name,
		       (unsigned long)call, (unsigned long)n_own, (unsigned long)n, (unsigned long)i);
		for (uint64_t j = i > 2 ? i - 2 : 0; j < i + 6; j++)
			printf(" %#lx/%#lx", j < n_own ? (unsigned long)own[j + 1] : 0,
			       j < n ? (unsigned long)set_aside[j] : 0);
		printf("\n  the other's blocks from the last that is the same on:");
		for (uint64_t j = i && i <= n ? set_aside_at[i - 1] : 1; n_other && j <= n_other &&
		     (i == n || j <= set_aside_at[i]); j++)
			printf(" %#lx", (unsigned long)other[j]);
		printf("\n");
	}
	return false;
}

int main(int argc, char **argv)
{
	uint64_t calls, same[KINDS] = { 0 }, made[KINDS] = { 0 }, pcs = 0, all = 0, full = 0;
	int own_fd, other_fd, busy = argc > 5 ? atoi(argv[5]) : 0;
	pid_t children[16];

	if (argc < 5 || busy > 16) {
		fprintf(stderr, "usage: oracle OWN OTHER ADDRESSES CALLS [BUSY]\n");
		return 2;
	}
	read_addresses(argv[3]);
	calls = strtoull(argv[4], NULL, 0);
	set_up();
	own = kcov_open(argv[1], WORDS, &own_fd);
	other = kcov_open(argv[2], WORDS, &other_fd);
	set_aside = reserve();
	set_aside_at = reserve();
	for (int i = 0; i < busy; i++) {
		children[i] = fork();
		if (!children[i])
			for (;;)
				syscall(SYS_getppid);
	}
	if (ioctl(other_fd, KCOV_ENABLE, KCOV_TRACE_PC))
		die(argv[2]);
	if (ioctl(own_fd, KCOV_ENABLE, KCOV_TRACE_PC))
		die(argv[1]);
	for (uint64_t i = 0; i < calls; i++) {
		unsigned int kind = i % KINDS;
		uint64_t n_own, n_other;

		__atomic_store_n(&other[0], 0, __ATOMIC_SEQ_CST);
		__atomic_store_n(&own[0], 0, __ATOMIC_SEQ_CST);
		kinds[kind].call();
		n_own = __atomic_load_n(&own[0], __ATOMIC_SEQ_CST);
		n_other = __atomic_load_n(&other[0], __ATOMIC_SEQ_CST);
		made[kind]++;
		pcs += n_own;
		all += n_other;
		full += n_own >= WORDS - 1 || n_other >= WORDS - 1;
		same[kind] += compare(kinds[kind].name, i, n_own, n_other);
	}
	if (ioctl(own_fd, KCOV_DISABLE, 0) || ioctl(other_fd, KCOV_DISABLE, 0))
		die("KCOV_DISABLE");
	for (int i = 0; i < busy; i++) {
		kill(children[i], SIGKILL);
		waitpid(children[i], NULL, 0);
	}
	calls = 0;
	for (unsigned int i = 0; i < KINDS; i++) {
		calls += same[i];
		if (same[i] != made[i])
			printf("kind %s made %lu same %lu\n", kinds[i].name, (unsigned long)made[i],
			       (unsigned long)same[i]);
	}
	printf("leaked %lu\nsame %lu\npcs %lu\nall %lu\nfull %lu\n", (unsigned long)leaked,
	       (unsigned long)calls, (unsigned long)pcs,
	       (unsigned long)all, (unsigned long)full);
	return 0;
}
