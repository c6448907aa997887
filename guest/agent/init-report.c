/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: reports to the host, a line each, on the second serial port. */
#include "channel.h"
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <termios.h>
#include <unistd.h>

#define REPORT_PORT "/dev/ttyS1"
/* Bytes that do not fit into the port's buffer are written again, for up to a second. */
#define WRITE_TRIES 100
#define WRITE_PAUSE_MS 10

static int port_fd = -1;

void report_open(void)
{
	struct termios settings;

	port_fd = open(REPORT_PORT, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (port_fd < 0) {
		say("%s: %s; this guest cannot report to the host", REPORT_PORT, strerror(errno));
		return;
	}
	if (!tcgetattr(port_fd, &settings)) {
		cfmakeraw(&settings);
		settings.c_cflag |= CLOCAL | CREAD;
		tcsetattr(port_fd, TCSANOW, &settings);
	}
}

int report_port(void)
{
	return port_fd;
}

/* Writes a line; gives up after a second, because a host that does not read must not stop the
 * guest. */
static void write_line(const char *line)
{
	size_t left = strlen(line);
	int tries = WRITE_TRIES;

	while (left && port_fd >= 0) {
		ssize_t done = write(port_fd, line, left);

		if (done > 0) {
			line += done;
			left -= (size_t)done;
		} else if (done < 0 && errno != EAGAIN && errno != EINTR) {
			return;
		} else {
			if (!tries--)
				return;
			sleep_ms(WRITE_PAUSE_MS);
		}
	}
}

/* Quotes text as a JSON string; text that does not fit is cut. */
static const char *json_string(const char *text, char *out, size_t size)
{
	size_t n = 0;

	out[n++] = '"';
	for (; *text && n + 8 < size; text++) {
		unsigned char c = (unsigned char)*text;

		if (c == '"' || c == '\\')
			n += (size_t)snprintf(out + n, size - n, "\\%c", c);
		else if (c < 0x20 || c >= 0x7f)
			n += (size_t)snprintf(out + n, size - n, "\\u%04x", c);
		else
			out[n++] = (char)c;
	}
	out[n++] = '"';
	out[n] = '\0';
	return out;
}

size_t ready_text(const char *device, char *text, size_t size)
{
	static char kernel[256];
	static long available;
	char path[128], memory[4096];
	struct utsname system;
	const char *line;
	int length;

	if (!*kernel) {
		uname(&system);
		json_string(system.release, kernel, sizeof(kernel));
		read_text("/proc/meminfo", memory, sizeof(memory));
		line = strstr(memory, "MemAvailable:");
		available = line ? strtol(line + strlen("MemAvailable:"), NULL, 10) : -1L;
	}
	length = snprintf(text, size,
			  "{\"state\":\"ready\",\"kernel\":%s,\"device\":%s,\"uptime_ms\":%ld,"
			  "\"mem_available_kib\":%ld,\"channel\":%d}",
			  kernel, json_string(device ? device : "", path, sizeof(path)),
			  uptime_ms(), available, channel_is_open() ? CHANNEL_VERSION : 0);
	return (size_t)length < size ? (size_t)length : size - 1;
}

void report_ready(const char *device)
{
	char line[1024];
	size_t length = ready_text(device, line, sizeof(line) - 1);

	line[length] = '\n';
	line[length + 1] = '\0';
	write_line(line);
}

void report_unhealthy(const char *what, const char *why)
{
	char line[1024], quoted[768];

	say("unhealthy: %s: %s", what, why);
	snprintf(line, sizeof(line), "{\"state\":\"unhealthy\",\"what\":\"%s\",\"why\":%s}\n", what,
		 json_string(why, quoted, sizeof(quoted)));
	write_line(line);
}

void report_stopping(const char *why)
{
	char line[256], quoted[128];

	snprintf(line, sizeof(line), "{\"state\":\"stopping\",\"why\":%s}\n",
		 json_string(why, quoted, sizeof(quoted)));
	write_line(line);
}
