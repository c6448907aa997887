/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: requests of the host, a line each, on the second serial port; see init.c. */
#include "channel.h"
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
#define SEED_BYTES CHANNEL_SEED_BYTES

/* A write makes the module describe this kernel to the host. */
#define HOST_FILE "/sys/kernel/debug/kcov_bridge_host"

static bool add_randomness(const unsigned char *bytes)
{
	struct {
		struct rand_pool_info info;
		unsigned char bytes[SEED_BYTES];
	} seed = { .info = { .entropy_count = 8 * SEED_BYTES, .buf_size = SEED_BYTES } };
	bool good;
	int fd;

	memcpy(seed.bytes, bytes, SEED_BYTES);
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

bool host_resume(time_t seconds, long nanoseconds, const unsigned char *seed)
{
	struct timespec now = { seconds, nanoseconds };

	if (clock_settime(CLOCK_REALTIME, &now)) {
		report_unhealthy("clock", strerror(errno));
		return false;
	}
	if (!add_randomness(seed)) {
		report_unhealthy("random", strerror(errno));
		return false;
	}
	return describe_kernel();
}

/* The same for a host that does not use the channel: a line with the seed in hex. */
static void resume(const char *line, const char *device)
{
	char hex[2 * SEED_BYTES + 1] = "";
	unsigned char seed[SEED_BYTES];
	long seconds, nanoseconds;

	if (sscanf(line, "resume %ld %ld %64[0-9a-f]", &seconds, &nanoseconds, hex) != 3)
		return;
	for (size_t i = 0; i < SEED_BYTES; i++)
		if (sscanf(hex + 2 * i, "%2hhx", &seed[i]) != 1)
			return;
	if (host_resume(seconds, nanoseconds, seed))
		report_ready(device);
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
				resume(line, device);
		} else if (length < sizeof(line) - 1) {
			line[length++] = c;
		}
	}
}
