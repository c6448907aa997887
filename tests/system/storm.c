// SPDX-License-Identifier: Apache-2.0
/*
 * A hostile guest: writes random and crafted values over the region that guest and host share,
 * and rings the doorbell at random, while threads use kcov as anybody does. Root's, for it takes
 * the PCI device's memory from sysfs; the words it aims at are found through the region's header.
 *
 *	storm MUTATIONS SEED
 *
 * Prints "NAME VALUE" lines; the exit status is 0 if no call hung and no canary was touched. The
 * canaries are instances that are initialised, mapped and never enabled: the storm leaves their
 * slots and areas alone, and so must everybody else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/kcov.h>

#define DEVICE		"/sys/kernel/debug/kcov"
#define THREADS		4
#define CANARIES	4
#define CANARY_WORDS	1024
#define OPS		17
#define DOORBELL	(12 / sizeof(uint32_t))
#define LONGEST_MS	8000

/* Words of the header. */
enum { SLOTS = 2, REQUESTS = 3, RESPONSES = 4, AREAS = 5, KICK = 16 };
/* Words of a request and of a response; each takes 8. */
enum { SEQ, OP, GENERATION, TASK, ARG0, ARG1, ARG2 };
enum { AREA_OFFSET = 2 };
/* KB_OP_MAP */
enum { MAP = 2 };

static volatile uint64_t *region;
static volatile uint32_t *registers;
static uint64_t words, slots, requests, responses, areas;

static struct canary {
	uint64_t *area;
	uint64_t slot, start;
} canaries[CANARIES];

static uint64_t state;
static uint64_t mutations, rings;

static atomic_bool over;
static atomic_ulong rounds, complete, calls, longest_ms;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

/* splitmix64 */
static uint64_t draw(uint64_t below)
{
	uint64_t z = state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	z ^= z >> 31;
	return below ? z % below : z;
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* ---- the device's memory ------------------------------------------------------------------- */

static bool holds(const char *directory, const char *name, const char *value)
{
	char path[256], found[16] = "";
	FILE *file;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	file = fopen(path, "r");
	if (!file || !fgets(found, sizeof(found), file))
		die(path);
	fclose(file);
	return !strncmp(found, value, strlen(value));
}

static void *map_resource(const char *directory, const char *name, uint64_t *length)
{
	char path[256];
	struct stat status;
	void *memory;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &status))
		die(path);
	*length = status.st_size;
	memory = mmap(NULL, *length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		die(path);
	close(fd);
	return memory;
}

static void find_device(void)
{
	uint64_t length;
	glob_t found;

	if (glob("/sys/bus/pci/devices/*", 0, NULL, &found))
		die("no PCI devices");
	for (size_t i = 0; i < found.gl_pathc; i++) {
		const char *directory = found.gl_pathv[i];

		if (!holds(directory, "vendor", "0x1af4") || !holds(directory, "device", "0x1110"))
			continue;
		registers = map_resource(directory, "resource0", &length);
		region = map_resource(directory, "resource2", &length);
		words = length / 8;
		slots = region[SLOTS];
		requests = region[REQUESTS] / 8;
		responses = region[RESPONSES] / 8;
		areas = region[AREAS] / 8;
		globfree(&found);
		return;
	}
	fprintf(stderr, "no ivshmem device\n");
	exit(2);
}

/* ---- canaries ------------------------------------------------------------------------------ */

static uint64_t pattern(int canary, int word)
{
	return 0xca0a51e5ca0a51e5 ^ (uint64_t)canary << 32 ^ (uint64_t)word * 0x100000001b3;
}

static uint64_t *kcov_open(int *fd, uint64_t size)
{
	uint64_t *area;

	*fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (*fd < 0)
		return NULL;
	if (ioctl(*fd, KCOV_INIT_TRACE, size))
		return NULL;
	area = mmap(NULL, size * 8, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	return area == MAP_FAILED ? NULL : area;
}

/* The slot of the area that begins with @first, mapped since the slots had the sequence numbers
 * @before. A slot that an earlier storm wrote to may name the same area, so its MAP must be new.
 */
static uint64_t slot_of(uint64_t first, const uint64_t *before)
{
	uint64_t found = slots;

	for (uint64_t slot = 0; slot < slots; slot++) {
		uint64_t start = region[responses + slot * 8 + AREA_OFFSET] / 8;
		const volatile uint64_t *request = &region[requests + slot * 8];

		if (start < areas || start >= words || region[start] != first ||
		    request[SEQ] == before[slot] || request[OP] != MAP)
			continue;
		if (found != slots) {
			fprintf(stderr, "slots %lu and %lu have the same area\n",
				(unsigned long)found, (unsigned long)slot);
			exit(2);
		}
		found = slot;
	}
	return found;
}

static void set_out_canaries(void)
{
	uint64_t *before = calloc(slots, sizeof(*before));
	int fd;

	/* The first area has an address that is easily hit by chance: not a canary's. */
	if (!before || !kcov_open(&fd, CANARY_WORDS))
		die(DEVICE);
	for (int i = 0; i < CANARIES; i++) {
		struct canary *canary = &canaries[i];

		for (uint64_t slot = 0; slot < slots; slot++)
			before[slot] = region[requests + slot * 8 + SEQ];
		canary->area = kcov_open(&fd, CANARY_WORDS);
		if (!canary->area)
			die("a canary");
		for (int word = 0; word < CANARY_WORDS; word++)
			canary->area[word] = pattern(i, word);
		canary->slot = slot_of(pattern(i, 0), before);
		if (canary->slot == slots) {
			fprintf(stderr, "canary %d is nowhere in the region\n", i);
			exit(2);
		}
		canary->start = region[responses + canary->slot * 8 + AREA_OFFSET] / 8;
	}
	free(before);
}

static int touched_canaries(void)
{
	int touched = 0;

	for (int i = 0; i < CANARIES; i++) {
		for (int word = 0; word < CANARY_WORDS; word++) {
			if (canaries[i].area[word] != pattern(i, word)) {
				printf("touched canary %d, word %d: %#lx\n", i, word,
				       (unsigned long)canaries[i].area[word]);
				touched++;
				break;
			}
		}
	}
	return touched;
}

static bool is_canary_slot(uint64_t slot)
{
	for (int i = 0; i < CANARIES; i++)
		if (canaries[i].slot == slot)
			return true;
	return false;
}

static bool is_canary(uint64_t word)
{
	for (int i = 0; i < CANARIES; i++)
		if (word - canaries[i].start < CANARY_WORDS)
			return true;
	if (word >= requests && word < requests + slots * 8)
		return is_canary_slot((word - requests) / 8);
	if (word >= responses && word < responses + slots * 8)
		return is_canary_slot((word - responses) / 8);
	return false;
}

/* ---- those who mean no harm ---------------------------------------------------------------- */

static void timed(uint64_t start)
{
	uint64_t took = now_ms() - start;
	unsigned long longest = atomic_load(&longest_ms);

	atomic_fetch_add(&calls, 1);
	while (took > longest && !atomic_compare_exchange_weak(&longest_ms, &longest, took))
		;
}

#define TIMED(call) ({ uint64_t start_ = now_ms(); __auto_type r_ = (call); timed(start_); r_; })

static void *honest(void *argument)
{
	unsigned int seed = (unsigned int)(uintptr_t)argument;

	while (!atomic_load(&over)) {
		uint64_t size = 512 << rand_r(&seed) % 8;
		int fd = TIMED(open(DEVICE, O_RDWR | O_CLOEXEC));
		uint64_t *area;
		bool good;

		atomic_fetch_add(&rounds, 1);
		if (fd < 0) {
			usleep(10000);
			continue;
		}
		good = !TIMED(ioctl(fd, KCOV_INIT_TRACE, size));
		area = TIMED(mmap(NULL, size * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
		if (area != MAP_FAILED) {
			if (!TIMED(ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))) {
				for (int i = 0; i < 20 && !atomic_load(&over); i++) {
					__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
					TIMED(syscall(SYS_getppid));
					/* The storm is over this area too: any count may stand there. */
					good &= __atomic_load_n(&area[0], __ATOMIC_RELAXED) > 0;
				}
				good &= !TIMED(ioctl(fd, KCOV_DISABLE, 0));
			} else {
				good = false;
			}
			TIMED(munmap(area, size * 8));
		} else {
			good = false;
		}
		TIMED(close(fd));
		if (good)
			atomic_fetch_add(&complete, 1);
	}
	return NULL;
}

/* ---- the storm ----------------------------------------------------------------------------- */

static void put(uint64_t word, uint64_t value)
{
	if (word >= words || is_canary(word) || is_canary(value / 8))
		return;
	region[word] = value;
	mutations++;
}

static void ring(uint32_t value)
{
	registers[DOORBELL] = value;
	rings++;
}

static uint64_t odd_value(void)
{
	static const uint64_t borders[] = {
		0, 1, 2, 511, 512, 513, 4095, 4096, 4097, 65536, 1 << 20, 1 << 23, (1 << 23) + 1,
		10 << 20, (10 << 20) + 1, 0x0fffffff, 0x10000000, 0x7fffffff, 0x80000000,
		0xffffffff, 1ULL << 32, 1ULL << 47, INT64_MAX, 1ULL << 63, UINT64_MAX - 1, UINT64_MAX,
	};

	switch (draw(4)) {
	case 0:
		return draw(0);
	case 1:
		return draw(16);
	case 2:
		return region[draw(areas)] + draw(3) - 1;
	default:
		return borders[draw(sizeof(borders) / sizeof(borders[0]))];
	}
}

static void kick(uint64_t slot)
{
	put(KICK, draw(8) ? ((region[KICK] >> 16) + 1) << 16 | slot : odd_value());
}

/* A request as the module would write it, of an instance or a task that may be another's. */
static void forged_request(void)
{
	static const uint64_t sizes[] = {
		2, 512, 1024, 64 << 10, 512 << 10, 1 << 20, 3 << 20, 6 << 20, 0x0fffffff, 1,
	};
	uint64_t slot = draw(4) ? draw(slots) : draw(16);
	uint64_t at = requests + slot * 8;
	uint64_t size = sizes[draw(sizeof(sizes) / sizeof(sizes[0]))];
	uint64_t op = 1 + draw(OPS);

	put(at + OP, op);
	if (!draw(3))
		put(at + GENERATION, draw(2) ? region[requests + draw(slots) * 8 + SEQ] : draw(0));
	put(at + TASK, draw(2) ? region[requests + draw(slots) * 8 + TASK] : draw(4) << 32 | draw(999));
	put(at + ARG0, draw(4) ? (op == 2 ? size * 8 : op == 1 ? size : draw(3)) : odd_value());
	put(at + ARG1, draw(4) ? 0 : odd_value());
	put(at + ARG2, draw(4) ? draw(2) : odd_value());
	put(at + SEQ, draw(4) ? region[at + SEQ] + 1 : odd_value());
	kick(slot);
}

/* An instance that nobody opened: a whole life's beginning, each step given time to be served. */
static void forged_instance(void)
{
	uint64_t slot = draw(slots), at = requests + slot * 8, generation = draw(0);
	uint64_t size = 512 << draw(13), task = region[requests + draw(slots) * 8 + TASK];

	for (uint64_t op = 1; op <= 3; op++) {
		put(at + OP, op);
		put(at + GENERATION, generation);
		put(at + TASK, task);
		put(at + ARG0, op == 1 ? size : op == 2 ? size * 8 : 0);
		put(at + ARG1, 0);
		put(at + ARG2, 0);
		put(at + SEQ, draw(0));
		kick(slot);
		ring(1 << 16);
		for (int i = 0; i < 2000; i++)
			__asm__ volatile("pause");
	}
}

static void area_word(void)
{
	uint64_t start = region[responses + draw(slots) * 8 + AREA_OFFSET] / 8;

	if (draw(2) && start >= areas && start < words)
		put(start + (draw(2) ? 0 : draw(512)), odd_value());
	else
		put(areas + draw(words - areas), odd_value());
}

static void rings_in_a_burst(void)
{
	for (uint64_t left = 1 + draw(32); left; left--) {
		switch (draw(4)) {
		case 0:
			ring(1 << 16 | draw(1 << 16));
			break;
		case 1:
			ring(draw(1 << 16) << 16 | draw(4));
			break;
		default:
			ring(1 << 16);
		}
	}
}

static void mutate(void)
{
	uint64_t kind = draw(1000);

	if (kind < 600)
		put(draw(8) ? draw(areas) : draw(32), odd_value());
	else if (kind < 750)
		forged_request();
	else if (kind < 752)
		forged_instance();
	else if (kind < 990)
		area_word();
	else
		rings_in_a_burst();
	if (!draw(2000))
		usleep(100 + draw(2000));
}

/* At the end instances that nobody opened hold all room there is, and their slots name them. */
static void last_wave(void)
{
	for (int i = 0; i < 256; i++)
		forged_instance();
}

int main(int argc, char **argv)
{
	uint64_t wanted = argc > 1 ? strtoull(argv[1], NULL, 0) : 1000000;
	pthread_t threads[THREADS];
	uint64_t start;
	int touched;

	state = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	setvbuf(stdout, NULL, _IONBF, 0);
	find_device();
	set_out_canaries();
	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, honest, (void *)(i + 1)))
			die("pthread_create");
	start = now_ms();
	while (mutations < wanted)
		mutate();
	atomic_store(&over, true);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	last_wave();
	touched = touched_canaries();
	printf("mutations %lu\nrings %lu\nmilliseconds %lu\n", (unsigned long)mutations,
	       (unsigned long)rings, (unsigned long)(now_ms() - start));
	printf("rounds %lu\ncomplete %lu\ncalls %lu\nlongest_ms %lu\ntouched_canaries %d\n",
	       atomic_load(&rounds), atomic_load(&complete), atomic_load(&calls),
	       atomic_load(&longest_ms), touched);
	return touched || atomic_load(&longest_ms) > LONGEST_MS;
}
