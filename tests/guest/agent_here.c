/* SPDX-License-Identifier: Apache-2.0 */
/* The agent's part of the channel as a program of this machine: agent_here DESCRIPTOR. */
#include "../../guest/agent/init-channel.c"

#include <sys/signalfd.h>
#include <sys/socket.h>

bool host_resume(time_t seconds, long nanoseconds, const unsigned char *seed)
{
	return seconds > 0 && nanoseconds >= 0 && seed;
}

size_t ready_text(const char *device, char *text, size_t size)
{
	return (size_t)snprintf(text, size, "{\"state\":\"ready\",\"device\":\"%s\"}",
				device ? device : "none");
}

int main(int argc, char **argv)
{
	static struct pollfd polled[1 + MAX_CHANNEL_POLLED];
	struct signalfd_siginfo signal;
	sigset_t signals;

	if (argc != 2)
		return 2;
	port = atoi(argv[1]);
	fcntl(port, F_SETFL, O_NONBLOCK);
	fcntl(port, F_SETFD, FD_CLOEXEC);
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGPIPE);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	polled[0] = (struct pollfd){ .fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK),
				     .events = POLLIN };
	for (;;) {
		int timeout = -1, status;
		size_t more = channel_poll(polled + 1, &timeout);
		pid_t ended;
		char byte;

		poll(polled, 1 + more, timeout);
		/* A socket has an end, a port has none. */
		if (!recv(port, &byte, 1, MSG_PEEK))
			return 0;
		while (read(polled[0].fd, &signal, sizeof(signal)) > 0)
			;
		while ((ended = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0)
			channel_child_changed(ended, status);
		channel_serve(polled + 1, more);
	}
}
