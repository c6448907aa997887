/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: requests of the host, a line each, on the second serial port; see init.c. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 256
#define SEED_BYTES 32 /* bridge/vm/machine.py has the same */

/* A write makes the module describe this kernel to the host. */
#define HOST_FILE "/sys/kernel/debug/kcov_bridge_host"

static bool add_randomness(const char *hex)
{
	struct {
		struct rand_pool_info info;
		unsigned char bytes[SEED_BYTES];
	} seed = { .info = { .entropy_count = 8 * SEED_BYTES, .buf_size = SEED_BYTES } };
	bool good;
	int fd;

	for (size_t i = 0; i < SEED_BYTES; i++)
		if (sscanf(hex + 2 * i, "%2hhx", &seed.bytes[i]) != 1)
			return false;
	fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	/* The first call mixes the bytes in, the second makes all later numbers depend on them. */
	good = fd >= 0 && !ioctl(fd, RNDADDENTROPY, &seed) && !ioctl(fd, RNDRESEEDCRNG);
	if (fd >= 0)
		close(fd);
	return good;
}

/* Makes the module describe this kernel to a host that may be new. */
static bool describe_kernel(void)
{
	int fd = open(HOST_FILE, O_WRONLY | O_CLOEXEC);
	bool good = fd >= 0 && write(fd, "1", 1) == 1;

	if (!good)
		report_unhealthy("host", strerror(errno));
	if (fd >= 0)
		close(fd);
	return good;
}

static void resume(const char *line, const char *device)
{
	char hex[2 * SEED_BYTES + 1] = "";
	struct timespec now;

	if (sscanf(line, "resume %ld %ld %64[0-9a-f]", &now.tv_sec, &now.tv_nsec, hex) != 3 ||
	    strlen(hex) != 2 * SEED_BYTES)
		return;
	if (clock_settime(CLOCK_REALTIME, &now)) {
		report_unhealthy("clock", strerror(errno));
		return;
	}
	if (!add_randomness(hex)) {
		report_unhealthy("random", strerror(errno));
		return;
	}
	ssh_daemon_continue();
	if (describe_kernel())
		report_ready(device);
}

static void carry_out(const char *line, const char *device)
{
	if (!strcmp(line, "sshd")) {
		ssh_daemon_start();
		report_ready(device);
	} else {
		resume(line, device);
	}
}

void host_read_requests(const char *device)
{
	static char line[LINE_MAX_BYTES];
	static size_t length;
	char c;

	while (read(report_port(), &c, 1) == 1) {
		if (c == '\n') {
			line[length] = '\0';
			length = 0;
			if (device)
				carry_out(line, device);
		} else if (length < sizeof(line) - 1) {
			line[length++] = c;
		}
	}
}
