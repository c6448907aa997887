// SPDX-License-Identifier: Apache-2.0
/*
 * The PCI device goes away while it is in use, and comes back.
 *
 *	removal DEVICE PERSONALITY REMOVE TEXT RESCAN TEXT
 *
 * REMOVE and RESCAN are the files of sysfs for that, TEXT is what is written there. The report is in
 * TAP, as of the programs in conformance. KCOV_ROUNDS is the number of removals under load.
 */
#include "kcov_test.h"

#include <sys/stat.h>

/* A file of sysfs, and what to write there. */
static char **removal, **rescan;

static void put(char **words)
{
	int fd = open(words[0], O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, words[1], strlen(words[1])) != (ssize_t)strlen(words[1]))
		bail("%s", words[0]);
	close(fd);
}

static int there(void)
{
	struct stat status;

	return !stat(kcov_device, &status);
}

/* What is left of an instance once its device is gone. */
static void is_gone(struct kcov *kcov, const char *who)
{
	uint64_t words = kcov->words;

	printf("# %s\n", who);
	is(control(kcov->fd, KCOV_DISABLE, 0), ENODEV, "DISABLE: ENODEV");
	is(control(kcov->fd, KCOV_ENABLE, KCOV_TRACE_PC), ENODEV, "ENABLE: ENODEV");
	is(control(kcov->fd, KCOV_INIT_TRACE, 512), ENODEV, "INIT_TRACE: ENODEV");
	is(try_map(kcov->fd, kcov_bytes(kcov), PROT_READ | PROT_WRITE, MAP_SHARED, 0), ENODEV,
	   "mmap: ENODEV");
	is(kcov->area[0] | kcov->area[words / 2] | kcov->area[words - 1], 0, "the area is blank");
	kcov->area[words - 1] = 5;
	is(kcov->area[words - 1], 5, "and takes what is written to it");
	kcov->area[words - 1] = 0;
	calls(100);
	is(count(kcov), 0, "calls leave no PCs");
}

/* All that one device can do: a new one, from open to close. */
static void works(const char *what)
{
	struct kcov kcov = kcov_new(WORDS);
	uint64_t sum = 0;

	for (uint64_t i = 0; i < WORDS; i++)
		sum += kcov.area[i];
	is(sum, 0, "a new area is zero");
	is(kcov_enable(&kcov), 0, what);
	ok(traces(&kcov), "and calls leave PCs");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
}

static void comes_back(void)
{
	put(rescan);
	for (int i = 0; i < 500 && !there(); i++)
		usleep(10000);
	ok(there(), "a rescan brings the device back");
}

static void while_enabled(void)
{
	struct kcov kcov = kcov_new(WORDS), idle = kcov_new(WORDS);
	int bare = kcov_open();

	is(kcov_enable(&kcov), 0, "ENABLE");
	ok(traces(&kcov), "and calls leave PCs");
	put(removal);
	ok(!there(), "the owner itself removes the device");
	is_gone(&kcov, "its own instance");
	is_gone(&idle, "one that is only mapped");
	is(control(bare, KCOV_INIT_TRACE, 512), ENODEV, "one that is only open: ENODEV");
	comes_back();
	is_gone(&kcov, "a new device is not the old one's instances'");
	works("the new device traces while old instances are open");
	kcov_free(&kcov);
	kcov_free(&idle);
	close(bare);
	works("and when they are closed");
}

/* Children inherit mappings; private ones keep what they hold. */
static void mappings(void)
{
	struct kcov kcov = kcov_new(WORDS);
	struct gate gate = gate_new();
	uint64_t *secret;
	pid_t pid;

	secret = mmap(NULL, kcov_bytes(&kcov), PROT_READ | PROT_WRITE, MAP_PRIVATE, kcov.fd, 0);

	if (secret == MAP_FAILED)
		bail("private mmap");
	/* Not the first page: Linux 6.1 cannot fork then. */
	secret[WORDS - 1] = 77;
	pid = child();
	if (!pid) {
		gate_wait(&gate);
		if (kcov.area[0] || kcov.area[WORDS - 1])
			_exit(1);
		kcov.area[0] = 1;
		if (secret[WORDS - 1] != 77)
			_exit(2);
		/* No page of its own: there is none to show. */
		(void)*(volatile uint64_t *)&secret[0];
		_exit(3);
	}
	put(removal);
	gate_open(&gate);
	is(wait_for(pid), -SIGBUS, "a child: shared mappings are blank, private pages stay, else SIGBUS");
	is(secret[WORDS - 1], 77, "a private page stays");
	comes_back();
	kcov_free(&kcov);
	munmap(secret, kcov_bytes(&kcov));
	gate_free(&gate);
}

/* ---- in the middle of requests ------------------------------------------------------------- */

static int stop;
static long errors, successes;

static void *use(void *argument)
{
	int how = (int)(intptr_t)argument;

	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
		int fd = open(kcov_device, O_RDWR | O_CLOEXEC);
		uint64_t *area = NULL;
		int good = 0;

		if (fd < 0) {
			usleep(1000);
			continue;
		}
		if (!ioctl(fd, KCOV_INIT_TRACE, WORDS))
			area = kcov_map(fd, WORDS * 8, PROT_READ | PROT_WRITE);
		if (area && !ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC)) {
			for (int i = 0; i < 200; i++) {
				if (how)
					__atomic_store_n(&area[0], 0, __ATOMIC_RELEASE);
				getppid();
				if (area[0] > WORDS)
					_exit(99);
			}
			good = !ioctl(fd, KCOV_DISABLE, 0);
		}
		__atomic_add_fetch(good ? &successes : &errors, 1, __ATOMIC_RELAXED);
		if (area)
			munmap(area, WORDS * 8);
		close(fd);
	}
	return NULL;
}

static void under_load(void)
{
	const char *text = getenv("KCOV_ROUNDS");
	int rounds = text ? atoi(text) : 10;
	pthread_t ids[4];

	for (long i = 0; i < 4; i++)
		pthread_create(&ids[i], NULL, use, (void *)(i & 1));
	for (int i = 0; i < rounds; i++) {
		long before = __atomic_load_n(&successes, __ATOMIC_RELAXED);

		for (int wait = 0; wait < 30000 &&
		     __atomic_load_n(&successes, __ATOMIC_RELAXED) < before + 8; wait++)
			usleep(1000);
		put(removal);
		usleep(i % 4 * 1000);
		put(rescan);
	}
	for (int i = 0; i < 500 && !there(); i++)
		usleep(10000);
	stop = 1;
	for (int i = 0; i < 4; i++)
		pthread_join(ids[i], NULL);
	ok(successes >= 8 * rounds, "threads trace between removals");
	ok(errors < successes, "and fail for a moment at each");
	printf("# %ld traced, %ld failed\n", successes, errors);
	works("after the last rescan the device is as new");
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	if (argc != 7)
		bail("usage: removal DEVICE PERSONALITY REMOVE TEXT RESCAN TEXT");
	removal = argv + 3;
	rescan = argv + 5;
	while_enabled();
	mappings();
	under_load();
	return end();
}
