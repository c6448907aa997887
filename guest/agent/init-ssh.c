/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: connections to SSH, accepted by process 1 or by a daemon that a snapshot holds. */
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
#include <sys/wait.h>
#include <unistd.h>

#define SSHD "/usr/sbin/sshd"
#define SSH_HOST_KEY "/etc/ssh/ssh_host_ed25519_key"
#define SSH_PORT 22
/* OpenSSH 9.8 and later execute this for each connection; a saved daemon would save no time. */
#define SSHD_SESSION "/usr/lib/openssh/sshd-session"
#define SSHD_PID_FILE "/run/sshd.pid"
#define SSHD_WAIT_MS 5000

static int listener = -1;
static pid_t daemon_pid; /* the daemon that listens in place of this process, or 0 */

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
	/* Standard error remains the console, which is where -e makes sshd log to. */
	dup2(connection, STDIN_FILENO);
	dup2(connection, STDOUT_FILENO);
	execl(SSHD, SSHD, "-i", "-e", (char *)NULL);
	say("%s: %s", SSHD, strerror(errno));
	_exit(127);
}

/* Makes this process accept connections again. */
static void replace_daemon(void)
{
	char why[128];

	daemon_pid = 0;
	if (!ssh_listen(why, sizeof(why)))
		say("sshd: %s", why);
}

void ssh_child_ended(pid_t pid)
{
	if (pid == daemon_pid)
		replace_daemon();
}

/* A client that connects to the stopped daemon waits until it continues, when the random numbers
 * are no longer the snapshot's. -r makes it fork without a further exec. */
void ssh_daemon_start(void)
{
	int null, waited = 0;

	if (daemon_pid || listener < 0 || !access(SSHD_SESSION, F_OK))
		return;
	close(listener);
	listener = -1;
	unlink(SSHD_PID_FILE);
	daemon_pid = fork();
	if (!daemon_pid) {
		leave_process_1();
		null = open("/dev/null", O_RDWR | O_CLOEXEC);
		dup2(null, STDIN_FILENO);
		dup2(null, STDOUT_FILENO);
		/* MaxStartups: as many connections at once as without a daemon. */
		execl(SSHD, SSHD, "-D", "-e", "-r", "-4", "-oPidFile=" SSHD_PID_FILE,
		      "-oMaxStartups=1000", (char *)NULL);
		_exit(127);
	}
	/* sshd writes the file once it listens. */
	while (daemon_pid > 0 && access(SSHD_PID_FILE, F_OK) && waited < SSHD_WAIT_MS) {
		sleep_ms(10);
		waited += 10;
		if (waitpid(daemon_pid, NULL, WNOHANG))
			daemon_pid = -1;
	}
	if (daemon_pid > 0 && !access(SSHD_PID_FILE, F_OK)) {
		kill(daemon_pid, SIGSTOP);
		return;
	}
	if (daemon_pid > 0) {
		kill(daemon_pid, SIGKILL);
		waitpid(daemon_pid, NULL, 0);
	}
	replace_daemon();
}

/* Its children use no random numbers of the snapshot: sshd asks the kernel for each, and OpenSSL
 * takes a new seed from the kernel after a fork. */
void ssh_daemon_continue(void)
{
	if (daemon_pid > 0)
		kill(daemon_pid, SIGCONT);
}
