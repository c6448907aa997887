// SPDX-License-Identifier: Apache-2.0
/*
 * A server over TCP, for tests: requests PORT. Each byte is a request, and is answered with itself.
 *
 *	m	done on behalf of the common handle 9
 *	u	done on behalf of the USB bus 3
 *	else	done on nobody's behalf
 */
#include <arpa/inet.h>
#include <kcov_bridge.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define N __attribute__((noinline))

static volatile unsigned int done;

N static void common_work(void) { done += 1; }
N static void usb_work(void) { done += 2; }

N static void plain_work(unsigned int request)
{
	if (request * 0x101 == 0x6363)
		done += 3;
}

static void serve(char request)
{
	if (request == 'm') {
		kcov_bridge_handle_begin(9);
		common_work();
		kcov_bridge_handle_end();
	} else if (request == 'u') {
		kcov_bridge_handle_begin(1ull << 56 | 3);
		usb_work();
		kcov_bridge_handle_end();
	} else {
		plain_work((unsigned char)request);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char request;

	if (argc != 2 || server < 0)
		return 2;
	address.sin_port = htons((unsigned short)atoi(argv[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(server, (struct sockaddr *)&address, sizeof(address)) || listen(server, 8))
		return 1;
	for (;;) {
		int connection = accept(server, NULL, NULL);

		if (connection < 0)
			return 1;
		while (read(connection, &request, 1) == 1) {
			serve(request);
			if (write(connection, &request, 1) != 1)
				break;
		}
		close(connection);
	}
}
