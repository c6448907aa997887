// SPDX-License-Identifier: Apache-2.0
/*
 * A server of lines over TCP, for tests: service PORT. Each line is a command, and has an answer.
 *
 *	add A B		the sum
 *	upper TEXT	the text in capitals
 *	crash		no answer: the process dies
 */
#include <arpa/inet.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int add(const char *words, char *answer, size_t size)
{
	long a, b;

	if (sscanf(words, "%ld %ld", &a, &b) != 2)
		return -1;
	if (a + b < 0)
		snprintf(answer, size, "minus %ld", -(a + b));
	else
		snprintf(answer, size, "%ld", a + b);
	return 0;
}

static int upper(const char *words, char *answer, size_t size)
{
	size_t at;

	for (at = 0; words[at] && at + 1 < size; at++)
		answer[at] = (char)toupper((unsigned char)words[at]);
	answer[at] = 0;
	return 0;
}

static int serve(const char *line, char *answer, size_t size)
{
	if (!strncmp(line, "add ", 4))
		return add(line + 4, answer, size);
	if (!strncmp(line, "upper ", 6))
		return upper(line + 6, answer, size);
	if (!strcmp(line, "crash"))
		abort();
	return -1;
}

static void converse(int connection)
{
	char line[256], answer[256];
	FILE *in = fdopen(dup(connection), "r");

	while (in && fgets(line, sizeof(line), in)) {
		line[strcspn(line, "\r\n")] = 0;
		if (serve(line, answer, sizeof(answer)))
			strcpy(answer, "error");
		dprintf(connection, "%s\n", answer);
	}
	if (in)
		fclose(in);
	close(connection);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	int one = 1, server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (argc != 2 || server < 0)
		return 2;
	address.sin_port = htons((unsigned short)atoi(argv[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(server, (struct sockaddr *)&address, sizeof(address)) || listen(server, 8))
		return 1;
	for (;;) {
		int connection = accept(server, NULL, NULL);

		if (connection >= 0)
			converse(connection);
	}
}
