/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness: a case is a datagram to a server of UDP.
 *
 *	cc -shared -fPIC -O2 -DPORT=53 -o udp_bytes.so udp_bytes.c
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef PORT
#define PORT 53
#endif
#define ADDRESS "10.0.2.100" /* bridge.targets.TARGET_ADDRESS */

enum { DATAGRAM = 1400, WAIT_MS = 100 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	/* A server that does not like what it got keeps silent. */
	struct timeval limit = { .tv_usec = WAIT_MS * 1000 };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	uint8_t answer[2048];

	inet_pton(AF_INET, ADDRESS, &server.sin_addr);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (connect(fd, (struct sockaddr *)&server, sizeof(server)) == 0 &&
	    send(fd, data, size < DATAGRAM ? size : DATAGRAM, MSG_NOSIGNAL) >= 0)
		recv(fd, answer, sizeof(answer), 0);
	close(fd);
	return 0;
}
