// SPDX-License-Identifier: Apache-2.0
/*
 * relay.py in C: starts in a tenth of the time, and passes data on with less of the processor's.
 * relay.py is the definition, and says what the arguments mean.
 *
 *	relay ADDRESS [--gate GATE] [--epoch FILE OFFSET]
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "epoch.h"

#define CHUNK	(256 * 1024)
#define SLOT	128

/* One direction: what was read and is not yet written, and its end. */
struct direction {
	int from, to;
	bool answers;		/* changes the epoch before it passes anything on */
	bool done;
	char *buffer;
	size_t start, end;
};

static bool map_epoch(const char *file, const char *place)
{
	unsigned long offset = strtoul(place, NULL, 10), page = (unsigned long)sysconf(_SC_PAGESIZE);
	int fd = open(file, O_RDWR | O_CLOEXEC);
	char *words;

	if (fd < 0)
		return false;
	words = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		     (off_t)(offset / page * page));
	close(fd);
	if (words == MAP_FAILED)
		return false;
	epoch = (volatile uint64_t *)(words + offset % page);
	return true;
}

/* Returns a descriptor, or -1. */
static int connect_to(const char *address)
{
	struct sockaddr_un path = { .sun_family = AF_UNIX };
	struct sockaddr_in port = { .sin_family = AF_INET,
				    .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	char slot[SLOT + 1] = "";
	int fd;

	if (address[0] == '@') {
		const char *colon = strrchr(address, ':');
		char file[4096];
		ssize_t got;

		if (!colon || (size_t)(colon - address) > sizeof(file))
			return -1;
		memcpy(file, address + 1, (size_t)(colon - address - 1));
		file[colon - address - 1] = 0;
		fd = open(file, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return -1;
		got = pread(fd, slot, SLOT, SLOT * atol(colon + 1));
		close(fd);
		if (got <= 0)
			return -1;
		address = slot;
	}
	if (address[0] == '/') {
		if (strlen(address) >= sizeof(path.sun_path))
			return -1;
		strcpy(path.sun_path, address);
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd >= 0 && !connect(fd, (struct sockaddr *)&path, sizeof(path)))
			return fd;
	} else {
		port.sin_port = htons((uint16_t)atoi(address));
		fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd >= 0 && !connect(fd, (struct sockaddr *)&port, sizeof(port)))
			return fd;
	}
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Closing it resets the connection. */
static void no_linger(int fd)
{
	struct linger now = { .l_onoff = 1 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

static void prepare(int fd)
{
	int on = 1, idle = 15, interval = 5, count = 3;

	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	/* Refused by a Unix socket. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
}

/* Carries what can be carried without waiting. Returns whether the connections are whole. */
static bool move(struct direction *way)
{
	ssize_t moved;

	if (way->done)
		return true;
	if (way->start == way->end) {
		moved = recv(way->from, way->buffer, CHUNK, 0);
		if (moved < 0)
			return errno == EAGAIN || errno == EINTR;
		if (way->answers)
			change_epoch();
		if (!moved) {
			way->done = true;
			return !shutdown(way->to, SHUT_WR);
		}
		way->start = 0;
		way->end = (size_t)moved;
	}
	/* Nearly always all of it can be sent at once, so try before polling. */
	moved = send(way->to, way->buffer + way->start, way->end - way->start, MSG_NOSIGNAL);
	if (moved < 0)
		return errno == EAGAIN || errno == EINTR;
	way->start += (size_t)moved;
	return true;
}

static short wanted(const struct direction *reads, const struct direction *writes)
{
	short events = 0;

	if (!reads->done && reads->start == reads->end)
		events |= POLLIN;
	if (writes->start < writes->end)
		events |= POLLOUT;
	return events;
}

/* Returns whether both directions ended; not if a connection broke, or the gate opened. */
static bool relay(int guest, int host, int gate)
{
	static char outward_buffer[CHUNK], inward_buffer[CHUNK];
	struct direction outward = { .from = guest, .to = host, .buffer = outward_buffer };
	struct direction inward = { .from = host, .to = guest, .answers = true,
				    .buffer = inward_buffer };
	bool hung_up[2] = { false, false };

	while (!outward.done || !inward.done) {
		struct pollfd ends[] = {
			{ .fd = guest, .events = wanted(&outward, &inward) },
			{ .fd = host, .events = wanted(&inward, &outward) },
			{ .fd = gate, .events = POLLIN },
		};
		struct direction *reads[] = { &outward, &inward }, *writes[] = { &inward, &outward };

		/* poll() reports a hang-up again and again: leave out where nothing is to be done. */
		for (int i = 0; i < 2; i++)
			if (hung_up[i] && !ends[i].events)
				ends[i].fd = -1;
		if (poll(ends, 3, -1) < 0) {
			if (errno == EINTR)
				continue;
			return false;
		}
		if (ends[2].revents)
			return false;
		for (int i = 0; i < 2; i++) {
			short events = ends[i].revents;

			if (events & (POLLERR | POLLNVAL))
				return false;
			hung_up[i] |= !!(events & POLLHUP);
			if (events & (POLLIN | POLLHUP) && !move(reads[i]))
				return false;
			if (events & POLLOUT && !move(writes[i]))
				return false;
		}
	}
	return true;
}

int main(int argc, char **argv)
{
	int guest = fcntl(0, F_DUPFD_CLOEXEC, 3), nowhere = open("/dev/null", O_RDWR);
	int gate = -1, at = 2, host;

	/* 0, 1 and 2 are the connection. */
	for (int fd = 0; fd < 3; fd++)
		dup2(nowhere, fd);
	if (argc < 2)
		return 2;
	if (at + 1 < argc && !strcmp(argv[at], "--gate")) {
		gate = open(argv[at + 1], O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (gate < 0)
			goto refused;
		at += 2;
	}
	if (at + 2 < argc && !strcmp(argv[at], "--epoch") && !map_epoch(argv[at + 1], argv[at + 2]))
		goto refused;
	host = connect_to(argv[1]);
	if (host < 0)
		goto refused;
	prepare(guest);
	prepare(host);
	if (relay(guest, host, gate))
		return 0;
	change_epoch();
	no_linger(host);
refused:
	no_linger(guest);
	return 1;
}
