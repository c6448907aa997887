/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness: a case is what a client sends to a server of 9P, on a connection of its own.
 *
 *	cc -shared -fPIC -O2 -o p9_bytes.so p9_bytes.c
 *
 * Messages follow one another as on the wire: a length in 4 bytes, which counts itself, and the
 * rest. Where a length does not fit what follows it is put right, so that what is behind it
 * arrives.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define PORT 564
#define ADDRESS "10.0.2.100" /* bridge.targets.TARGET_ADDRESS */

enum { LENGTH = 4, SHORTEST = 7, MESSAGES = 32 };

/* Send all of it; nonzero if the server has gone. */
static int send_all(int fd, const uint8_t *data, size_t size)
{
	while (size > 0) {
		ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

		if (sent <= 0)
			return -1;
		data += sent;
		size -= (size_t)sent;
	}
	return 0;
}

static int send_message(int fd, const uint8_t *data, size_t size)
{
	uint8_t length[LENGTH] = { (uint8_t)size, (uint8_t)(size >> 8), (uint8_t)(size >> 16), 0 };

	return send_all(fd, length, LENGTH) || send_all(fd, data + LENGTH, size - LENGTH);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	struct timeval limit = { .tv_sec = 2 };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	uint8_t answer[4096];

	inet_pton(AF_INET, ADDRESS, &server.sin_addr);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (connect(fd, (struct sockaddr *)&server, sizeof(server))) {
		close(fd);
		return 0;
	}
	for (int i = 0; i < MESSAGES && size >= SHORTEST; i++) {
		size_t length = data[0] | data[1] << 8 | data[2] << 16 | (size_t)data[3] << 24;

		if (length < SHORTEST || length > size)
			length = size;
		if (send_message(fd, data, length) || recv(fd, answer, sizeof(answer), 0) <= 0)
			break;
		data += length;
		size -= length;
	}
	shutdown(fd, SHUT_WR);
	while (recv(fd, answer, sizeof(answer), 0) > 0)
		;
	close(fd);
	return 0;
}
