/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: connections to SSH, for each of which process 1 starts an sshd. */
#define _GNU_SOURCE
#include "init.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define SSHD "/usr/sbin/sshd"
#define SSH_HOST_KEY "/etc/ssh/ssh_host_ed25519_key"
#define SSH_PORT 22

static int listener = -1;

bool ssh_listen(char *why, size_t size)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(SSH_PORT) };
	int yes = 1, fd;

	mkdir("/run/sshd", 0755);
	if (access(SSHD, X_OK) || access(SSH_HOST_KEY, R_OK)) {
		snprintf(why, size, "%s: %s", access(SSHD, X_OK) ? SSHD : SSH_HOST_KEY,
			 strerror(errno));
		return false;
	}
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) ||
	    bind(fd, (struct sockaddr *)&any, sizeof(any)) || listen(fd, 64)) {
		snprintf(why, size, "port %d: %s", SSH_PORT, strerror(errno));
		if (fd >= 0)
			close(fd);
		return false;
	}
	listener = fd;
	return true;
}

int ssh_listener(void)
{
	return listener;
}

/* Undoes in a child what sshd should not inherit from process 1. */
static void leave_process_1(void)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
}

void ssh_serve(void)
{
	int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	pid_t child;
	int yes = 1;

	if (connection < 0)
		return;
	/* Otherwise a small message waits until the previous one is acknowledged. */
	setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
	child = fork();
	if (child < 0)
		say("an SSH connection was refused: fork: %s", strerror(errno));
	if (child) {
		close(connection);
		return;
	}
	leave_process_1();
	/*
	 * Standard error remains the console, which is where -e makes sshd log to: its errors only,
	 * because it has three more lines for each connection.
	 */
	dup2(connection, STDIN_FILENO);
	dup2(connection, STDOUT_FILENO);
	execl(SSHD, SSHD, "-i", "-e", "-o", "LogLevel=ERROR", (char *)NULL);
	say("%s: %s", SSHD, strerror(errno));
	_exit(127);
}
