/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prints cases as the guest's decoder understands them. Reads cases from standard input, each after
 * its length in 4 bytes, and writes each one's text with a NUL at the end.
 */
#include "../../guest/agent/files-decode.h"

#include <stdio.h>
#include <stdlib.h>

static uint8_t data[1 << 20];
static char text[4 * FILES_MOST_DATA + 256];
static struct files_case present;

int main(void)
{
	uint32_t length;

	while (fread(&length, sizeof(length), 1, stdin) == 1) {
		int parallel = 0;

		if (length > sizeof(data) || fread(data, 1, length, stdin) != length)
			return 1;
		files_decode(data, length, &present);
		for (size_t i = 0; i < present.count; i++) {
			const struct files_call *call = &present.calls[i];

			if (call->kind == FILES_join)
				parallel = 0;
			if (files_print(call, text, sizeof(text)) >= sizeof(text))
				return 1;
			if (parallel)
				printf("%d: ", call->thread);
			printf("%s\n", text);
			if (call->kind == FILES_parallel)
				parallel = 1;
		}
		if (present.left_out)
			printf("# %zu more, which are not made\n", present.left_out);
		putchar(0);
	}
	return ferror(stdin) || fflush(stdout);
}
