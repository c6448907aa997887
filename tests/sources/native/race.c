// SPDX-License-Identifier: Apache-2.0
/*
 * Blocks run while the bridge reads and clears: race HITS. No block may be lost.
 *
 * Workers (two threads of a process, and one of a process that it forks) run the same blocks again and
 * again. Before each run a worker notes which look of the reader was the last to begin. When it has run
 * the block, that look or a later one must have reported the block, once a look has begun after that.
 * Prints the number of runs and of lost ones. Linked with the run time and with the reader.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCKS 256
#define WORKERS 3
#define AHEAD 64

#ifdef __clang__
#define PLAIN __attribute__((no_sanitize("coverage")))
#else
#define PLAIN
#endif

struct kbn_reader;
struct said {
	uint32_t kind, first, count;
	char rest[512];
};
struct kbn_reader *kbn_open(int fd, const char *epoch_path, uint64_t epoch_offset,
			    const char *handles);
uint32_t kbn_modules(const struct kbn_reader *reader);
int kbn_said(const struct kbn_reader *reader, uint32_t index, struct said *said);
void kbn_place(struct kbn_reader *reader, uint32_t first, uint32_t count, uint64_t first_pc,
	       const int32_t *slots);
long kbn_drain(struct kbn_reader *reader, uint64_t *out, size_t room, int force, int all);

struct worker {
	_Alignas(64) uint64_t done;
	_Alignas(64) uint64_t checked;
	struct {
		uint32_t block;
		uint64_t look;
	} runs[AHEAD];
};

static struct shared {
	_Alignas(64) uint64_t looks; /* that have begun */
	_Alignas(64) uint64_t single; /* the block to run alone, from 1 on */
	_Alignas(64) uint64_t epoch;
	struct worker workers[WORKERS];
} *shared;
static uint64_t hits;
static volatile int sink;

#define F(n)                                                                                       \
	static __attribute__((noinline)) void f##n(void) { sink++; }
#define F4(n) F(n##0) F(n##1) F(n##2) F(n##3)
#define F16(n) F4(n##0) F4(n##1) F4(n##2) F4(n##3)
#define F64(n) F16(n##0) F16(n##1) F16(n##2) F16(n##3)
F64(1) F64(2) F64(3) F64(4)

#define P(n) f##n,
#define P4(n) P(n##0) P(n##1) P(n##2) P(n##3)
#define P16(n) P4(n##0) P4(n##1) P4(n##2) P4(n##3)
#define P64(n) P16(n##0) P16(n##1) P16(n##2) P16(n##3)
static void (*const functions[BLOCKS])(void) = {P64(1) P64(2) P64(3) P64(4)};

PLAIN static void *work(void *argument)
{
	struct worker *worker = argument;
	/* All run the same blocks in the same order, so that they meet. */
	uint64_t run;

	for (run = 0; run < hits; run++) {
		uint32_t block = (uint32_t)(run * 7 % BLOCKS);

		while (run - __atomic_load_n(&worker->checked, __ATOMIC_ACQUIRE) >= AHEAD)
			sched_yield();
		worker->runs[run % AHEAD].block = block;
		worker->runs[run % AHEAD].look =
			__atomic_load_n(&shared->looks, __ATOMIC_SEQ_CST);
		functions[block]();
		__atomic_store_n(&worker->done, run + 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

PLAIN static int child(void)
{
	pthread_t thread;
	uint64_t block = 0;

	/* Each block alone, so that its PC can be told. */
	while (block < BLOCKS) {
		if (__atomic_load_n(&shared->single, __ATOMIC_ACQUIRE) == 2 * block + 1) {
			functions[block++]();
			__atomic_store_n(&shared->single, 2 * block, __ATOMIC_RELEASE);
		} else {
			sched_yield();
		}
	}
	while (__atomic_load_n(&shared->single, __ATOMIC_ACQUIRE) != 2 * BLOCKS + 1)
		sched_yield();
	if (fork() == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		work(&shared->workers[2]);
		_exit(0);
	}
	pthread_create(&thread, NULL, work, &shared->workers[1]);
	work(&shared->workers[0]);
	pthread_join(thread, NULL);
	wait(NULL);
	return 0;
}

PLAIN int main(int argc, char **argv)
{
	static uint64_t out[1 << 16], reported[1 << 16];
	static uint32_t slot_of[BLOCKS];
	struct kbn_reader *reader;
	struct said said;
	uint64_t runs = 0, lost = 0, unseen_epoch = 0, seen = 0, look, block;
	int fd, memory, i, running = WORKERS;
	char path[64], number[32];
	pid_t process;

	hits = strtoull(argv[1], NULL, 0);
	if (argc == 3) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED,
			      atoi(argv[2]), 0);
		return child();
	}
	memory = memfd_create("shared", 0);
	fd = memfd_create("kcov-bridge-native", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (memory < 0 || fd < 0 || ftruncate(memory, sizeof(*shared)))
		return 2;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), memory);
	reader = kbn_open(fd, path, (uint64_t)((char *)&shared->epoch - (char *)shared), "");
	if (!reader)
		return 2;
	snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), fd);
	snprintf(number, sizeof(number), "%d", memory);
	process = fork();
	if (process == 0) {
		setenv("KCOV_BRIDGE_NATIVE", path, 1);
		execl("/proc/self/exe", argv[0], argv[1], number, NULL);
		_exit(2);
	}
	while (!kbn_modules(reader))
		usleep(1000);
	if (!kbn_said(reader, 0, &said) || said.count > 1 << 12)
		return 2;
	kbn_place(reader, said.first, said.count, 16, NULL);
	for (block = 0; block < BLOCKS; block++) {
		kbn_drain(reader, out, 1 << 16, 1, 0);
		__atomic_store_n(&shared->single, 2 * block + 1, __ATOMIC_RELEASE);
		while (__atomic_load_n(&shared->single, __ATOMIC_ACQUIRE) != 2 * block + 2)
			sched_yield();
		if (kbn_drain(reader, out, 1 << 16, 0, 0) != 1)
			return 3;
		slot_of[block] = (uint32_t)(out[0] / 16);
	}
	__atomic_store_n(&shared->single, 2 * BLOCKS + 1, __ATOMIC_RELEASE);
	while (running) {
		uint64_t done[WORKERS], epoch;
		long count, at;

		for (i = 0; i < WORKERS; i++)
			done[i] = __atomic_load_n(&shared->workers[i].done, __ATOMIC_ACQUIRE);
		/* As the guest: it asks if the epoch has changed, and remembers what it read. */
		epoch = __atomic_load_n(&shared->epoch, __ATOMIC_SEQ_CST);
		count = 0;
		if (epoch != seen) {
			seen = epoch;
			look = __atomic_add_fetch(&shared->looks, 1, __ATOMIC_SEQ_CST);
			count = kbn_drain(reader, out, 1 << 16, 0, 0);
			for (at = 0; at < count; at++)
				reported[out[at] / 16] = look;
		} else {
			unseen_epoch++;
		}
		running = 0;
		for (i = 0; i < WORKERS; i++) {
			struct worker *worker = &shared->workers[i];
			uint64_t run;

			for (run = worker->checked; run < done[i]; run++) {
				uint32_t ran = worker->runs[run % AHEAD].block;

				runs++;
				if (reported[slot_of[ran]] < worker->runs[run % AHEAD].look)
					lost++;
			}
			__atomic_store_n(&worker->checked, done[i], __ATOMIC_RELEASE);
			running += done[i] < hits;
		}
		if (waitpid(process, NULL, WNOHANG) == process && running)
			return 4;
	}
	printf("%llu runs, %llu lost, %llu looks, %llu without news\n", (unsigned long long)runs,
	       (unsigned long long)lost, (unsigned long long)shared->looks,
	       (unsigned long long)unseen_epoch);
	return lost != 0;
}
