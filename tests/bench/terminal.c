/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness for `kcov-bridge fuzz --harness PATH.so`: the bytes of a case are what a program writes
 * to a virtual terminal of the guest, whose kernel looks for escape sequences in them.
 */
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MOST 512

static int terminal = -1;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	terminal = open("/dev/tty9", O_RDWR | O_NOCTTY);
	if (terminal < 0)
		perror("/dev/tty9");
	return terminal < 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
	static char text[2 + MOST] = "\033c"; /* a reset: as if it had just been opened */

	/* Copied, so that the kernel meets no page fault on the way. */
	if (length > MOST)
		length = MOST;
	memcpy(text + 2, data, length);
	return write(terminal, text, 2 + length) < 0;
}
