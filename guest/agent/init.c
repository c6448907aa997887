/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-init: the guest's first process, from the first instruction in user mode to power-off.
 *
 * One static program with three tasks:
 *
 *   /init in the initramfs    loads the modules named in /modules/load, finds the squashfs disk,
 *                             puts a tmpfs over it, copies /layer on top, switches root and
 *                             executes itself there;
 *   process 1 of the guest    sets up the network, kcov_bridge.ko, the kcov device and SSH, and
 *                             reports on the second serial port; then it reaps processes, watches
 *                             the power button and ends the guest;
 *   poweroff, reboot          ask process 1 to do so (with -f: at once, without asking).
 *
 * A report is one JSON object a line on /dev/ttyS1:
 *
 *   {"state":"ready","kernel":"…","device":"…","uptime_ms":N,"mem_available_kib":N,"channel":N}
 *   {"state":"unhealthy","what":"module","why":"…"}
 *   {"state":"stopping","why":"power button"}
 *
 * "channel" is the version of the protocol on the virtio-serial port over which the host runs
 * commands (channel.h), 0 without such a port. Process 1 serves it too: it is the one process that
 * no command can kill or stop.
 *
 * After it loaded a snapshot, the host sends the time and 32 random bytes, so that the guest does
 * not continue with the snapshot's clock and random numbers. They are part of the HELLO on the
 * channel; without one, they are a line on the report port, which is answered "ready":
 *
 *   resume 1700000000 500000000 00112233…
 *
 * An unhealthy guest still serves SSH if it can, so that a person can look inside. Process 1
 * accepts SSH connections and starts an `sshd -i` for each: the guest is ready without waiting for
 * a daemon, and no daemon can die.
 */
#include "init.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { POLL_SIGNALS, POLL_SSH, POLL_HOST, POLL_BUTTONS };

/* Returns a descriptor to read the signals from. */
static int block_signals(void)
{
	sigset_t signals;

	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGPIPE);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	return signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void take_signals(int fd)
{
	struct signalfd_siginfo signal;
	pid_t ended;
	int status;

	while (read(fd, &signal, sizeof(signal)) == (ssize_t)sizeof(signal)) {
		if (signal.ssi_signo == SIGTERM)
			stop_guest(RB_POWER_OFF, "poweroff");
		if (signal.ssi_signo == SIGINT)
			stop_guest(RB_AUTOBOOT, "reboot");
	}
	while ((ended = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0)
		channel_child_changed(ended, status);
}

/* The main loop of process 1. signals: the descriptor of block_signals(). */
__attribute__((noreturn)) static void serve(int signals, const struct pollfd *buttons,
					    size_t button_count, const char *device)
{
	static struct pollfd polled[POLL_BUTTONS + MAX_POWER_BUTTONS + MAX_CHANNEL_POLLED];
	size_t count = POLL_BUTTONS + button_count, more;

	polled[POLL_SIGNALS] = (struct pollfd){ .fd = signals, .events = POLLIN };
	polled[POLL_SSH] = (struct pollfd){ .fd = -1, .events = POLLIN };
	polled[POLL_HOST] = (struct pollfd){ .fd = report_port(), .events = POLLIN };
	memcpy(polled + POLL_BUTTONS, buttons, button_count * sizeof(*buttons));
	for (;;) {
		int timeout = -1;

		polled[POLL_SSH].fd = ssh_listener();
		more = channel_poll(polled + count, &timeout);
		if (poll(polled, count + more, timeout) < 0 && errno != EINTR)
			say("poll: %s", strerror(errno));
		take_signals(signals);
		channel_serve(polled + count, more);
		if (polled[POLL_SSH].revents & POLLIN)
			ssh_serve();
		if (polled[POLL_HOST].revents & POLLIN)
			host_read_requests(device);
		for (size_t i = POLL_BUTTONS; i < count; i++)
			if (polled[i].revents && power_button_pressed(polled[i].fd))
				stop_guest(RB_POWER_OFF, "power button");
	}
}

__attribute__((noreturn)) static void boot_initramfs(void)
{
	load_boot_modules();
	if (kernel_argument("kcov_init.symbols"))
		dump_symbols();
	mount_root();
	switch_root();
}

__attribute__((noreturn)) static void boot_guest(void)
{
	struct pollfd buttons[MAX_POWER_BUTTONS];
	const char *network, *device, *what = NULL;
	int signals = block_signals();
	size_t button_count;
	char why[512] = "";

	set_up_environment();
	network = set_up_network();
	device = set_up_device(&what, why, sizeof(why));
	button_count = power_buttons_open(buttons);
	channel_open(device);

	/* Report one fault: the first in the order in which a person would look. */
	if (!device)
		report_unhealthy(what, why);
	if (!ssh_listen(why, sizeof(why)) && device)
		report_unhealthy("sshd", why);
	else if (device && network)
		report_unhealthy("network", network);
	else if (device)
		report_ready(device);

	serve(signals, buttons, button_count, device);
}

int main(int argc, char **argv)
{
	const char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];

	if (getpid() != 1)
		return ask_for_stop(strcmp(name, "kcov-init") ? name : "poweroff", argc, argv);
	open_console();
	report_open();
	if (in_initramfs())
		boot_initramfs();
	boot_guest();
}
