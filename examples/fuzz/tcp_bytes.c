/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness: a case is all that a client sends on a connection of its own to a server of TCP.
 *
 *	cc -shared -fPIC -O2 -DPORT=502 -o tcp_bytes.so tcp_bytes.c
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef PORT
#define PORT 502
#endif
#define ADDRESS "10.0.2.100" /* bridge.targets.TARGET_ADDRESS */

enum { WAIT_MS = 50 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	/* Silence is an end: a server may keep the connection open. */
	struct timeval limit = { .tv_usec = WAIT_MS * 1000 };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	uint8_t answer[4096];

	inet_pton(AF_INET, ADDRESS, &server.sin_addr);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (connect(fd, (struct sockaddr *)&server, sizeof(server)) == 0) {
		while (size > 0) {
			ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

			if (sent <= 0)
				break;
			data += sent;
			size -= (size_t)sent;
		}
		while (recv(fd, answer, sizeof(answer), 0) > 0)
			;
	}
	close(fd);
	return 0;
}
