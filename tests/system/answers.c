// SPDX-License-Identifier: Apache-2.0
/*
 * Is what a target did before it answered in the area of the call that got the answer?
 *
 *	answers ADDRESS PORT PCS THREADS CALLS SEED QUIET
 *
 * Each thread has an instance and a connection of its own: of TCP; of UDP if a "u" precedes PORT; or
 * the device ADDRESS followed by its number if ADDRESS is a path. It sends requests of two bytes: its
 * own number and which of BRANCHES branches the target is to take; the answer is one byte. The file
 * PCS has the PC of each branch, a hex number a line, thread by thread. Between requests come less
 * than QUIET calls that nobody answers, and the answer is waited for in several ways. Ends after
 * CALLS traced calls, or a few more. Prints how many requests, calls, and answers without their PC there were; exit
 * status 1 where there was such an answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include <linux/kcov.h>

#define WORDS		(64 << 10)
#define BRANCHES	64
#define MOST_THREADS	16
#define WAYS		12
/* A branch is not taken again for so many requests: what is late shows in another one's area. */
#define RECENT		8
#define SHOWN		5

static uint64_t pcs[MOST_THREADS][BRANCHES];
static struct sockaddr_in target = { .sin_family = AF_INET };
static const char *device;
static int kind = SOCK_STREAM;
static long calls_each, quiet_most;
static unsigned long seed;
static atomic_long requests, calls, missed;

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static bool covered(const uint64_t *area, uint64_t pc)
{
	uint64_t count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);

	for (uint64_t i = 1; i <= count; i++)
		if (area[i] == pc)
			return true;
	return false;
}

/* Waits for one byte, in one of WAYS ways; returns how many system calls it took. */
static long receive(int fd, unsigned int way)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	long made = 1;
	char byte;

	if (way < WAYS / 2 && way) {
		poll(&ready, 1, -1);
		made++;
	} else if (way == 0 && device) {
		while (poll(&ready, 1, 0) == 0) {
			sched_yield();
			made += 2;
		}
		made++;
	} else if (way == 0) {
		while (recv(fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK) < 0) {
			if (errno != EAGAIN)
				err(2, "recv");
			sched_yield();
			made += 2;
		}
		made++;
	}
	if (read(fd, &byte, 1) != 1)
		errx(2, "no answer");
	return made;
}

static int connection(unsigned long thread)
{
	struct termios raw;
	char path[64];
	int one = 1, fd;

	if (device) {
		snprintf(path, sizeof(path), "%s%lu", device, thread);
		fd = open(path, O_RDWR | O_NOCTTY);
		if (fd < 0)
			err(2, "%s", path);
		if (isatty(fd)) {
			if (tcgetattr(fd, &raw))
				err(2, "tcgetattr");
			cfmakeraw(&raw);
			cfsetspeed(&raw, B115200);
			if (tcsetattr(fd, TCSANOW, &raw))
				err(2, "tcsetattr");
		}
		return fd;
	}
	fd = socket(AF_INET, kind, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&target, sizeof(target)))
		err(2, "connect");
	if (kind == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static void *work(void *argument)
{
	unsigned long thread = (unsigned long)argument;
	uint64_t state = seed * 0x9e3779b97f4a7c15 + thread + 1;
	long made = 0, done = 0, asked = 0, late = 0;
	unsigned int recent[RECENT] = { 0 };
	int fd, sock;
	uint64_t *area;

	fd = open("/sys/kernel/debug/kcov", O_RDWR);
	if (fd < 0 || ioctl(fd, KCOV_INIT_TRACE, WORDS))
		err(2, "kcov");
	area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED)
		err(2, "mmap");
	sock = connection(thread);
	if (ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		err(2, "KCOV_ENABLE");
	/* Calls that only ask whether the answer is there do not count: their number varies. */
	while (done < calls_each) {
		unsigned char request[2] = { (unsigned char)thread };
		long quiet = (long)(next(&state) % quiet_most);
		unsigned int branch;
		bool again;

		do {
			branch = (unsigned int)(next(&state) % BRANCHES);
			again = false;
			for (int i = 0; i < RECENT; i++)
				again |= recent[i] == branch;
		} while (again);
		recent[asked % RECENT] = branch;
		request[1] = (unsigned char)branch;
		for (long i = 0; i < quiet; i++)
			syscall(SYS_getppid);
		__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
		if (write(sock, request, sizeof(request)) != sizeof(request))
			err(2, "write");
		done += quiet + 2;
		made += quiet + 1 + receive(sock, (unsigned int)(next(&state) % WAYS));
		asked++;
		if (!covered(area, pcs[thread][branch])) {
			if (late++ < SHOWN)
				fprintf(stderr, "thread %lu, request %ld: branch %u, %" PRIu64
					" PCs\n", thread, asked, branch, area[0]);
		}
	}
	if (ioctl(fd, KCOV_DISABLE, 0))
		err(2, "KCOV_DISABLE");
	requests += asked;
	calls += made;
	missed += late;
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[MOST_THREADS];
	unsigned long count;
	FILE *file;

	if (argc != 8)
		errx(2, "usage: answers ADDRESS PORT PCS THREADS CALLS SEED QUIET");
	if (argv[1][0] == '/')
		device = argv[1];
	if (argv[2][0] == 'u')
		kind = SOCK_DGRAM;
	target.sin_port = htons((uint16_t)atoi(argv[2] + (kind == SOCK_DGRAM)));
	inet_pton(AF_INET, argv[1], &target.sin_addr);
	quiet_most = atol(argv[7]);
	count = strtoul(argv[4], NULL, 10);
	if (count < 1 || count > MOST_THREADS)
		errx(2, "1 to %d threads", MOST_THREADS);
	calls_each = atol(argv[5]) / (long)count;
	seed = strtoul(argv[6], NULL, 10);
	file = fopen(argv[3], "r");
	if (!file)
		err(2, "%s", argv[3]);
	for (unsigned long i = 0; i < count; i++)
		for (int j = 0; j < BRANCHES; j++)
			if (fscanf(file, "%" SCNx64, &pcs[i][j]) != 1)
				errx(2, "too few PCs");
	fclose(file);
	for (unsigned long i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, work, (void *)i))
			err(2, "pthread_create");
	for (unsigned long i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	printf("requests %ld\ncalls %ld\nmissed %ld\n", requests, calls, missed);
	return missed != 0;
}
