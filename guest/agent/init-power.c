/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: the power button, the end of the guest, and the programs that ask for it. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_INPUT_DEVICES 32

/* How long processes get to end after SIGTERM, and the last sync to finish. */
#define TERM_WAIT_MS 2000
#define TERM_AGAIN_MS 100
#define SYNC_WAIT_MS 2000

#define BITS_PER_LONG (8 * sizeof(long))

size_t power_buttons_open(struct pollfd *buttons)
{
	size_t count = 0;

	for (int i = 0; i < MAX_INPUT_DEVICES && count < MAX_POWER_BUTTONS; i++) {
		unsigned long keys[KEY_MAX / BITS_PER_LONG + 1] = { 0 };
		char path[32];
		int fd;

		snprintf(path, sizeof(path), "/dev/input/event%d", i);
		fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			continue;
		if (ioctl(fd, EVIOCGBIT(EV_KEY, sizeof(keys)), keys) >= 0 &&
		    keys[KEY_POWER / BITS_PER_LONG] >> KEY_POWER % BITS_PER_LONG & 1)
			buttons[count++] = (struct pollfd){ .fd = fd, .events = POLLIN };
		else
			close(fd);
	}
	return count;
}

bool power_button_pressed(int fd)
{
	struct input_event event;

	while (read(fd, &event, sizeof(event)) == (ssize_t)sizeof(event))
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			return true;
	return false;
}

/* Reaps children for a time. Returns true once only this process is left: orphans become children
 * of process 1. */
static bool reap_for(long ms)
{
	long end = uptime_ms() + ms;

	for (;;) {
		pid_t pid = waitpid(-1, NULL, WNOHANG);

		if (pid < 0 && errno == ECHILD)
			return true;
		if (pid <= 0) {
			if (uptime_ms() >= end)
				return false;
			sleep_ms(5);
		}
	}
}

/* Each wait has a limit, because a mount without a server may block a process, or sync, forever. */
void stop_guest(int how, const char *why)
{
	long waited;

	report_stopping(why);
	/* Repeated, because sshd misses a signal that comes just before it waits for its connection. */
	for (waited = 0; waited < TERM_WAIT_MS; waited += TERM_AGAIN_MS) {
		kill(-1, SIGTERM);
		if (reap_for(TERM_AGAIN_MS))
			break;
	}
	if (waited >= TERM_WAIT_MS) {
		kill(-1, SIGKILL);
		reap_for(TERM_WAIT_MS);
	}
	if (!fork()) {
		sync();
		_exit(0);
	}
	reap_for(SYNC_WAIT_MS);
	reboot(how);
	for (;;)
		pause();
}

int ask_for_stop(const char *name, int argc, char **argv)
{
	bool reboots = !strcmp(name, "reboot"), force = argc == 2 && !strcmp(argv[1], "-f");

	if (argc > 1 && !force) {
		fprintf(stderr, "usage: %s [-f]\n"
				"Ends all processes and %s the guest; -f does it at once.\n",
			name, reboots ? "restarts" : "powers off");
		return 2;
	}
	if (force) {
		sync();
		reboot(reboots ? RB_AUTOBOOT : RB_POWER_OFF);
	} else if (!kill(1, reboots ? SIGINT : SIGTERM)) {
		return 0;
	}
	fprintf(stderr, "%s: %s\n", name, strerror(errno));
	return 1;
}
