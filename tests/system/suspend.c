// SPDX-License-Identifier: Apache-2.0
/*
 * Suspends the machine past the kernel, as a guest may that means harm: the PM1 control register
 * of a q35's chipset, sleep type S3.
 */
#include <err.h>
#include <stdlib.h>
#include <sys/io.h>
#include <unistd.h>

#define PM1_CONTROL	0x604
#define SLEEP_S3	0x2400

int main(void)
{
	if (iopl(3))
		err(EXIT_FAILURE, "iopl");
	outw(SLEEP_S3, PM1_CONTROL);
	sleep(100);
	errx(EXIT_FAILURE, "the machine did not suspend");
}
