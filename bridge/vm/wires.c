// SPDX-License-Identifier: Apache-2.0
/*
 * The process that carries the guest's wires to the target: connections through the shared region
 * (struct kb_wire in guest/module/kcov_bridge_abi.h). bridge/vm/wires.py starts and commands it.
 *
 *	wires REGION BYTES EPOCH BELL GUEST CONTROL
 *
 * REGION, BELL, GUEST and CONTROL are descriptors: the region of BYTES bytes, the eventfd that the
 * guest rings, the one that interrupts the guest, and a SOCK_SEQPACKET socket for commands. EPOCH is
 * the offset of the coverage epoch, 0 for none. Each command is answered by one byte, an errno:
 *
 *	open OFFSET ADDRESS	connect to ADDRESS, a port or the path of a Unix socket
 *	close OFFSET		the guest has closed it: send what it has written, then end
 *	reset			reset all connections at once
 *
 * The area at an offset may be freed when close or reset are answered. The guest may write anything
 * into it: each word is read once and bounded, and a connection with impossible positions is reset.
 * Before anything from the target becomes visible to the guest, the epoch changes, as in relay.c.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "epoch.h"

/* Words of struct kb_wire; bridge/vm/wires.py gives their indices and the ring's size. */
#ifndef RING_BYTES
#error "compile it with bridge/vm/wires.py"
#endif

#define PAGE	4096
#define MOST	4096

struct wire {
	uint64_t offset;
	uint64_t *words;	/* NULL once the guest has closed it */
	char *rest;		/* then: what is still to be sent, from rest_at to rest_end */
	size_t rest_at, rest_end;
	uint64_t sent, taken;
	int fd;			/* -1: ended */
	bool connecting;
	bool eof;		/* the target has closed its half */
	bool full;		/* no room for the guest; HOST_FULL says so, which it may overwrite */
	bool hung_up;		/* poll() says so again and again */
};

static struct wire wires[MOST];
static size_t count;
static char *region;
static uint64_t region_bytes;
static int bell, guest_bell;

static uint64_t look(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void tell(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static void interrupt(void)
{
	const uint64_t one = 1;

	/* EAGAIN: it is rung already. */
	if (write(guest_bell, &one, sizeof(one)) < 0 && errno != EAGAIN)
		err(1, "the guest's bell");
}

static char *outward(const struct wire *wire)
{
	return (char *)wire->words + PAGE;
}

static char *inward(const struct wire *wire)
{
	return outward(wire) + RING_BYTES;
}

/* End the connection on the host's side; the guest finds the end if it has not closed its own. */
static void end(struct wire *wire, bool reset)
{
	struct linger now = { .l_onoff = 1 };

	if (wire->fd < 0)
		return;
	if (reset)
		setsockopt(wire->fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	close(wire->fd);
	wire->fd = -1;
	free(wire->rest);
	wire->rest = NULL;
	if (!wire->words)
		return;
	change_epoch();
	tell(&wire->words[HOST_ENDED], WIRE_RESET);
	interrupt();
}

/* Send what the guest has written. */
static void send_some(struct wire *wire)
{
	ssize_t moved;

	while (wire->fd >= 0 && wire->words) {
		uint64_t waiting = look(&wire->words[GUEST_SENT]) - wire->taken;
		size_t at = wire->taken % RING_BYTES, part = RING_BYTES - at;

		if (!waiting)
			return;
		if (waiting > RING_BYTES) {
			end(wire, true);
			return;
		}
		if (part > waiting)
			part = waiting;
		moved = send(wire->fd, outward(wire) + at, part, MSG_NOSIGNAL);
		if (moved < 0) {
			if (errno != EAGAIN && errno != EINTR)
				end(wire, true);
			return;
		}
		wire->taken += (uint64_t)moved;
		tell(&wire->words[HOST_TAKEN], wire->taken);
		/* Pairs with the guest's: guest_full, barrier, host_taken. */
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (look(&wire->words[GUEST_FULL])) {
			tell(&wire->words[GUEST_FULL], 0);
			interrupt();
		}
	}
	while (wire->fd >= 0 && !wire->words && wire->rest_at < wire->rest_end) {
		moved = send(wire->fd, wire->rest + wire->rest_at, wire->rest_end - wire->rest_at,
			     MSG_NOSIGNAL);
		if (moved < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (moved < 0)
			end(wire, true);
		else
			wire->rest_at += (size_t)moved;
	}
	if (wire->fd >= 0 && !wire->words)
		end(wire, false);
}

/* Return whether a part of the ring to the guest is free. */
static bool find_room(struct wire *wire, size_t *part)
{
	for (int tries = 0; tries < 2; tries++) {
		uint64_t used = wire->sent - look(&wire->words[GUEST_TAKEN]);
		size_t at = wire->sent % RING_BYTES;

		if (used > RING_BYTES) {
			end(wire, true);
			return false;
		}
		*part = RING_BYTES - used < RING_BYTES - at ? RING_BYTES - used : RING_BYTES - at;
		if (*part) {
			wire->full = false;
			tell(&wire->words[HOST_FULL], 0);
			return true;
		}
		wire->full = true;
		tell(&wire->words[HOST_FULL], 1);
		/* Pairs with the guest's: guest_taken, barrier, host_full. */
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
	}
	return false;
}

/* Give the guest what the target has sent. */
static void receive_some(struct wire *wire)
{
	size_t part;
	ssize_t moved;

	if (wire->fd < 0 || !wire->words || wire->eof || !find_room(wire, &part))
		return;
	moved = recv(wire->fd, inward(wire) + wire->sent % RING_BYTES, part, MSG_DONTWAIT);
	if (moved < 0) {
		if (errno != EAGAIN && errno != EINTR)
			end(wire, true);
		return;
	}
	change_epoch();
	if (!moved) {
		wire->eof = true;
		tell(&wire->words[HOST_ENDED], WIRE_CLOSED);
		interrupt();
		return;
	}
	wire->sent += (uint64_t)moved;
	tell(&wire->words[HOST_SENT], wire->sent);
	/* Pairs with the guest's: guest_polls, barrier, host_sent. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!look(&wire->words[GUEST_POLLS]))
		interrupt();
}

/* ---- commands ------------------------------------------------------------------------------ */

static int connect_to(const char *address, bool *connecting)
{
	struct sockaddr_un path = { .sun_family = AF_UNIX };
	struct sockaddr_in port = { .sin_family = AF_INET,
				    .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	bool local = address[0] == '/';
	int fd, on = 1, done;

	if (local && strlen(address) >= sizeof(path.sun_path))
		return -ENAMETOOLONG;
	fd = socket(local ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	if (local) {
		strcpy(path.sun_path, address);
		done = connect(fd, (struct sockaddr *)&path, sizeof(path));
	} else {
		port.sin_port = htons((uint16_t)atoi(address));
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		done = connect(fd, (struct sockaddr *)&port, sizeof(port));
	}
	*connecting = done && errno == EINPROGRESS;
	if (done && !*connecting) {
		done = errno;
		close(fd);
		return -done;
	}
	return fd;
}

static int open_wire(uint64_t offset, const char *address)
{
	struct wire wire = { .offset = offset };

	if (count == MOST)
		return EMFILE;
	if (offset % PAGE || offset > region_bytes ||
	    PAGE + 2 * (uint64_t)RING_BYTES > region_bytes - offset)
		return EINVAL;
	wire.words = (uint64_t *)(region + offset);
	wire.fd = connect_to(address, &wire.connecting);
	if (wire.fd < 0)
		return -wire.fd;
	wires[count++] = wire;
	return 0;
}

static int close_wire(uint64_t offset)
{
	for (size_t i = 0; i < count; i++) {
		struct wire *wire = &wires[i];
		uint64_t waiting;

		if (!wire->words || wire->offset != offset)
			continue;
		waiting = look(&wire->words[GUEST_SENT]) - wire->taken;
		if (wire->fd >= 0 && waiting <= RING_BYTES) {
			size_t at = wire->taken % RING_BYTES, part = RING_BYTES - at;

			if (part > waiting)
				part = waiting;
			wire->rest = malloc(waiting + 1);
			if (wire->rest) {
				memcpy(wire->rest, outward(wire) + at, part);
				memcpy(wire->rest + part, outward(wire), waiting - part);
				wire->rest_end = waiting;
			}
		}
		wire->words = NULL;
		if (!wire->rest)
			end(wire, true);
		else if (!wire->connecting)
			send_some(wire);
		return 0;
	}
	return ENOENT;
}

static bool obey(int control)
{
	char text[512], address[256];
	unsigned long offset;
	ssize_t size = recv(control, text, sizeof(text) - 1, 0);
	unsigned char answer = EINVAL;

	if (size <= 0)
		return false;
	text[size] = 0;
	if (sscanf(text, "open %lu %255[^\n]", &offset, address) == 2) {
		answer = (unsigned char)open_wire(offset, address);
	} else if (sscanf(text, "close %lu", &offset) == 1) {
		answer = (unsigned char)close_wire(offset);
	} else if (!strcmp(text, "reset")) {
		for (size_t i = 0; i < count; i++)
			end(&wires[i], true);
		answer = 0;
	}
	return send(control, &answer, 1, MSG_NOSIGNAL) == 1;
}

/* ---- the loop ------------------------------------------------------------------------------ */

static short wanted(const struct wire *wire)
{
	uint64_t waiting = wire->words ? look(&wire->words[GUEST_SENT]) - wire->taken : 1;
	short events = 0;

	if (wire->connecting)
		return POLLOUT;
	if (wire->words && !wire->eof && !wire->full)
		events |= POLLIN;
	if (waiting)
		events |= POLLOUT;
	return events;
}

static void serve(struct wire *wire, short events)
{
	int failed = 0;
	socklen_t size = sizeof(failed);

	if (wire->connecting && events) {
		getsockopt(wire->fd, SOL_SOCKET, SO_ERROR, &failed, &size);
		if (failed) {
			end(wire, true);
			return;
		}
		wire->connecting = false;
	}
	if (wire->connecting)
		return;
	wire->hung_up |= !!(events & POLLHUP);
	if (events & (POLLERR | POLLNVAL)) {
		end(wire, true);
		return;
	}
	send_some(wire);
	receive_some(wire);
}

int main(int argc, char **argv)
{
	static struct pollfd polled[2 + MOST];
	int control;

	if (argc != 7)
		errx(2, "bridge/vm/wires.py starts this");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	region_bytes = strtoull(argv[2], NULL, 10);
	region = mmap(NULL, region_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
	if (region == MAP_FAILED)
		err(1, "the region");
	if (atol(argv[3]))
		epoch = (volatile uint64_t *)(region + atol(argv[3]));
	bell = atoi(argv[4]);
	guest_bell = atoi(argv[5]);
	control = atoi(argv[6]);
	for (;;) {
		uint64_t rung;
		size_t had, kept = 0;

		for (size_t i = 0; i < count; i++) {
			if (wires[i].fd < 0 && !wires[i].words)
				continue;
			wires[kept++] = wires[i];
		}
		count = had = kept;
		polled[0] = (struct pollfd){ .fd = bell, .events = POLLIN };
		polled[1] = (struct pollfd){ .fd = control, .events = POLLIN };
		for (size_t i = 0; i < count; i++) {
			short events = wires[i].fd < 0 ? 0 : wanted(&wires[i]);

			polled[2 + i] = (struct pollfd){
				.fd = wires[i].hung_up && !events ? -1 : wires[i].fd,
				.events = events,
			};
		}
		if (poll(polled, 2 + count, -1) < 0 && errno != EINTR)
			err(1, "poll");
		if (polled[0].revents && read(bell, &rung, sizeof(rung)) < 0 && errno != EAGAIN)
			err(1, "the bell");
		for (size_t i = 0; i < had; i++)
			if (wires[i].fd >= 0 && (polled[0].revents || polled[2 + i].revents))
				serve(&wires[i], polled[2 + i].revents);
		if (polled[1].revents && !obey(control))
			return 0;
	}
}
