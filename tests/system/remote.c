// SPDX-License-Identifier: Apache-2.0
/*
 * KCOV_REMOTE_ENABLE from a program's side.
 *
 *	remote ADDRESS PORT REQUESTS
 *
 * The main thread enables remote coverage for the common handle 9 and the USB bus 3; a second one
 * enables plain coverage and sends REQUESTS, a byte at a time, each answered with a byte. Prints
 * `errno` lines for what must fail, then `remote` and `plain` lines, one a PC.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/kcov.h>

#define WORDS	(64 << 10)
#define USB	(1ULL << 56)

struct remote_argument {
	struct kcov_remote_arg head;
	uint64_t handles[2];
};

static int open_kcov(uint64_t **area)
{
	int fd = open("/sys/kernel/debug/kcov", O_RDWR);

	if (fd < 0 || ioctl(fd, KCOV_INIT_TRACE, WORDS))
		err(1, "kcov");
	*area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (*area == MAP_FAILED)
		err(1, "mmap");
	return fd;
}

static int remote_enable(int fd, uint64_t common, uint64_t handle)
{
	struct remote_argument argument = {
		.head = { .trace_mode = KCOV_TRACE_PC, .area_size = WORDS, .num_handles = 1,
			  .common_handle = common },
	};

	memcpy(argument.head.handles, &handle, sizeof(handle));
	return ioctl(fd, KCOV_REMOTE_ENABLE, &argument) ? errno : 0;
}

static void print_area(const char *name, const uint64_t *area)
{
	uint64_t count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);

	for (uint64_t i = 1; i <= count && i < WORDS; i++)
		printf("%s 0x%llx\n", name, (unsigned long long)area[i]);
}

static char **arguments;
static uint64_t *plain_area;

static void *client(void *unused)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	int fd = open_kcov(&plain_area);
	int sock = socket(AF_INET, SOCK_STREAM, 0);

	(void)unused;
	address.sin_port = htons((uint16_t)atoi(arguments[2]));
	if (inet_pton(AF_INET, arguments[1], &address.sin_addr) != 1 ||
	    connect(sock, (struct sockaddr *)&address, sizeof(address)))
		err(1, "connect");
	if (ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		err(1, "KCOV_ENABLE");
	for (const char *request = arguments[3]; *request; request++) {
		char answer;

		if (write(sock, request, 1) != 1 || read(sock, &answer, 1) != 1)
			err(1, "request");
	}
	if (ioctl(fd, KCOV_DISABLE, 0))
		err(1, "KCOV_DISABLE");
	close(sock);
	return NULL;
}

int main(int argc, char **argv)
{
	uint64_t *area, *other_area;
	pthread_t thread;
	int fd, other;

	if (argc != 4)
		errx(2, "usage: remote ADDRESS PORT REQUESTS");
	arguments = argv;
	fd = open_kcov(&area);
	other = open_kcov(&other_area);
	printf("errno %d\n", ioctl(fd, KCOV_REMOTE_ENABLE, (void *)8) ? errno : 0);
	printf("errno %d\n", remote_enable(fd, 9, USB | 1ULL << 40));
	if (remote_enable(fd, 9, USB | 3))
		err(1, "KCOV_REMOTE_ENABLE");
	printf("errno %d\n", remote_enable(other, 10, USB | 4));
	if (pthread_create(&thread, NULL, client, NULL))
		errx(1, "pthread_create");
	pthread_join(thread, NULL);
	print_area("remote", area);
	print_area("plain", plain_area);
	if (ioctl(fd, KCOV_DISABLE, 0))
		err(1, "KCOV_DISABLE");
	if (remote_enable(other, 10, USB | 4))
		err(1, "KCOV_REMOTE_ENABLE");
	return 0;
}
