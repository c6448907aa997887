// SPDX-License-Identifier: Apache-2.0
/*
 * The work of a service, bound to the processor: native_service ROUNDS. It parses and checks lines, and
 * prints the nanoseconds of processor time of a line.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint32_t sum(const char *text, size_t length)
{
	uint32_t value = 2166136261u;
	size_t i;

	for (i = 0; i < length; i++) {
		if (text[i] == '\\')
			continue;
		value = (value ^ (uint8_t)text[i]) * 16777619u;
	}
	return value;
}

static long number(const char **text)
{
	long value = 0;
	int minus = **text == '-';

	*text += minus;
	while (**text >= '0' && **text <= '9')
		value = value * 10 + *(*text)++ - '0';
	return minus ? -value : value;
}

static long serve(const char *line)
{
	const char *at = strchr(line, ' ');

	if (!at)
		return -1;
	if (!strncmp(line, "add ", 4)) {
		long left;

		at++;
		left = number(&at);
		at += *at == ' ';
		return left + number(&at);
	}
	if (!strncmp(line, "sum ", 4))
		return (long)sum(at + 1, strlen(at + 1));
	return -1;
}

int main(int argc, char **argv)
{
	static const char *const lines[] = {
		"add 1234 -777", "sum the quick brown fox jumps over the lazy dog", "add 5 6",
		"sum a\\b\\c, and more of it until this is of some length", "none",
	};
	long rounds = argc > 1 ? atol(argv[1]) : 1000, i;
	volatile long total = 0;
	struct timespec time;

	for (i = 0; i < rounds; i++)
		total += serve(lines[i % 5]);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	printf("%.2f\n", ((double)time.tv_sec * 1e9 + (double)time.tv_nsec) / (double)rounds);
	return 0;
}
