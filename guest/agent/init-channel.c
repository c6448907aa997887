/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-init: commands of the host, over the virtio-serial port that channel.h describes.
 *
 * Nothing here waits: the port and all pipes are non-blocking. What must be told to the host is
 * state of the command that it is about, and becomes a frame when there is room; so no memory grows,
 * and a command that writes without end cannot keep another's frames back. A command's output is
 * read only as far as the host has given credit.
 *
 * What can hang (the file system, execve) is done by the command's own processes: init-command.c.
 */
#define _GNU_SOURCE
#include "channel.h"
#include "init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORTS "/sys/class/virtio-ports"
#define DRIVER "/sys/bus/virtio/drivers/virtio_console"
#define VIRTIO_DEVICES "/sys/bus/virtio/devices"
#define VIRTIO_ID_CONSOLE 3

#define IN_BYTES (2 * (CHANNEL_PAYLOAD_LIMIT + CHANNEL_HEADER_BYTES))
#define OUT_BYTES (2 * (CHANNEL_PAYLOAD_LIMIT + CHANNEL_HEADER_BYTES))
/* Output of commands leaves this for other frames, and is not cut into smaller pieces than that. */
#define OUT_RESERVE 8192
#define PIECE_BYTES 4096
#define READY_BYTES 1024
/* How long a port whose host is gone is left alone. */
#define HOST_GONE_MS 1000

enum { OUT, ERR, STREAMS };

struct command {
	uint32_t number; /* 0: unused */
	bool started;
	char *spec;
	size_t spec_size;
	pid_t leader; /* 0 once it was reaped */
	uint32_t status;
	int error; /* an errno: it did not start */

	int in; /* ends of pipes, or -1 */
	int out[STREAMS];
	int owed[STREAMS]; /* after its end: what the command has written and nobody read yet */
	uint32_t credit[STREAMS];
	unsigned char *pending; /* a part of stdin that the pipe had no room for */
	size_t pending_at, pending_size;
	bool in_ends;

	/* what the host must be told */
	uint32_t taken;
	bool tell_exit, tell_complete, tell_end;
};

static int port = -1;
static const char *kcov_device;
static uint32_t session; /* 0: none yet */
static bool synchronised;
static bool tell_ready, tell_pong, tell_broken;
static struct command commands[CHANNEL_COMMANDS];
static size_t first; /* the command that may write first this time */
static unsigned char in_buffer[IN_BYTES], out_buffer[OUT_BYTES];
static size_t in_size, out_at, out_size;
static long host_gone_until;

/* ---- the port ------------------------------------------------------------------------------ */

static bool has_console_device(void)
{
	DIR *devices = opendir(VIRTIO_DEVICES);
	struct dirent *entry;
	bool found = false;

	while (devices && (entry = readdir(devices))) {
		char path[512], id[32];

		snprintf(path, sizeof(path), VIRTIO_DEVICES "/%s/device", entry->d_name);
		read_text(path, id, sizeof(id));
		found = found || strtol(id, NULL, 16) == VIRTIO_ID_CONSOLE;
	}
	if (devices)
		closedir(devices);
	return found;
}

static void load_driver(void)
{
	pid_t child;

	if (!access(DRIVER, F_OK))
		return;
	child = fork();
	if (!child) {
		execl("/sbin/modprobe", "modprobe", "virtio_console", (char *)NULL);
		_exit(127);
	}
	if (child > 0)
		waitpid(child, NULL, 0);
}

static bool find_port(char *path, size_t size)
{
	DIR *ports = opendir(PORTS);
	struct dirent *entry;
	bool found = false;

	while (ports && !found && (entry = readdir(ports))) {
		char file[512], name[64];

		snprintf(file, sizeof(file), PORTS "/%s/name", entry->d_name);
		read_text(file, name, sizeof(name));
		name[strcspn(name, "\n")] = '\0';
		if (!strcmp(name, CHANNEL_PORT)) {
			found = true;
			snprintf(path, size, "/dev/%s", entry->d_name);
		}
	}
	if (ports)
		closedir(ports);
	return found;
}

void channel_open(const char *device)
{
	char path[512];
	bool found;

	kcov_device = device;
	if (!has_console_device())
		return;
	load_driver();
	if (access(DRIVER, F_OK))
		return;
	for (int waited = 0; !(found = find_port(path, sizeof(path))); waited += 10) {
		if (waited > DEVICE_WAIT_MS)
			return;
		sleep_ms(10);
	}
	port = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (port < 0)
		say("%s: %s; commands of the host come by SSH alone", path, strerror(errno));
}

bool channel_is_open(void)
{
	return port >= 0;
}

/* ---- frames to the host -------------------------------------------------------------------- */

static void put_number(unsigned char *at, uint32_t number)
{
	for (int i = 0; i < 4; i++)
		at[i] = (unsigned char)(number >> 8 * i);
}

static uint32_t get_number(const unsigned char *at)
{
	return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 |
	       (uint32_t)at[3] << 24;
}

static int64_t get_long(const unsigned char *at)
{
	return (int64_t)(get_number(at) | (uint64_t)get_number(at + 4) << 32);
}

/* Returns how large a payload may be so that "reserve" bytes stay free; moves what waits to the
 * beginning. */
static size_t out_room(size_t reserve)
{
	size_t used = out_size - out_at + CHANNEL_HEADER_BYTES + reserve;

	if (out_at) {
		memmove(out_buffer, out_buffer + out_at, out_size - out_at);
		out_size -= out_at;
		out_at = 0;
	}
	return used < OUT_BYTES ? OUT_BYTES - used : 0;
}

static void out_header(uint32_t kind, uint32_t number, size_t size)
{
	unsigned char *header = out_buffer + out_size;

	put_number(header, (uint32_t)size);
	put_number(header + 4, session);
	put_number(header + 8, number);
	put_number(header + 12, kind);
	out_size += CHANNEL_HEADER_BYTES + size;
}

/* Adds a frame with a number, or with none, if there is room. */
static bool out_frame(uint32_t kind, uint32_t number, const uint32_t *value)
{
	size_t size = value ? 4 : 0;

	if (out_room(0) < size)
		return false;
	if (value)
		put_number(out_buffer + out_size + CHANNEL_HEADER_BYTES, *value);
	out_header(kind, number, size);
	return true;
}

static void out_ready(void)
{
	if (out_room(0) < READY_BYTES)
		return;
	out_header(CHANNEL_READY, 0,
		   ready_text(kcov_device, (char *)out_buffer + out_size + CHANNEL_HEADER_BYTES,
			      READY_BYTES));
	tell_ready = false;
}

/* Reads what a command has written, as far as there is credit and room. */
static void out_data(struct command *command, int stream)
{
	static const uint32_t kinds[] = { CHANNEL_STDOUT, CHANNEL_STDERR };
	int fd = command->out[stream];
	size_t most;
	ssize_t got;

	while (fd >= 0 && command->credit[stream]) {
		most = out_room(OUT_RESERVE);
		if (most < PIECE_BYTES)
			return;
		if (most > CHANNEL_PAYLOAD_LIMIT)
			most = CHANNEL_PAYLOAD_LIMIT;
		if (most > command->credit[stream])
			most = command->credit[stream];
		got = read(fd, out_buffer + out_size + CHANNEL_HEADER_BYTES, most);
		if (got > 0) {
			out_header(kinds[stream], command->number, (size_t)got);
			command->credit[stream] -= (uint32_t)got;
			command->owed[stream] -= (int)got;
			/* Another one's turn, unless this is the rest of an ended one. */
			if (command->owed[stream] <= 0)
				return;
		} else if (got < 0 && errno == EINTR) {
			continue;
		} else {
			if (!got || errno != EAGAIN) {
				close(fd);
				command->out[stream] = -1;
			}
			command->owed[stream] = 0;
			return;
		}
	}
}

static void forget_spec(struct command *command)
{
	free(command->spec);
	command->spec = NULL;
	command->spec_size = 0;
}

static void close_in(struct command *command)
{
	if (command->in >= 0)
		close(command->in);
	command->in = -1;
	free(command->pending);
	command->pending = NULL;
	command->pending_at = command->pending_size = 0;
}

/* Forgets a command; its processes are killed, and reaped later. */
static void drop(struct command *command)
{
	if (command->leader > 0)
		command_kill(command->leader, SIGKILL);
	close_in(command);
	for (int stream = 0; stream < STREAMS; stream++)
		if (command->out[stream] >= 0)
			close(command->out[stream]);
	forget_spec(command);
	memset(command, 0, sizeof(*command));
}

static void out_command(struct command *command)
{
	bool ended = command->started && !command->leader;

	for (int stream = 0; stream < STREAMS; stream++)
		out_data(command, stream);
	if (command->error) {
		uint32_t error = (uint32_t)command->error;

		if (out_frame(CHANNEL_FAILED, command->number, &error))
			drop(command);
		return;
	}
	if (command->taken && out_frame(CHANNEL_TAKEN, command->number, &command->taken))
		command->taken = 0;
	if (command->tell_exit && out_frame(CHANNEL_EXIT, command->number, &command->status))
		command->tell_exit = false;
	if (!ended || command->tell_exit)
		return;
	if (command->tell_complete && command->owed[OUT] <= 0 && command->owed[ERR] <= 0 &&
	    out_frame(CHANNEL_COMPLETE, command->number, NULL))
		command->tell_complete = false;
	if (!command->tell_complete && command->tell_end && command->out[OUT] < 0 &&
	    command->out[ERR] < 0 && out_frame(CHANNEL_END, command->number, NULL))
		command->tell_end = false;
}

/* Writes what waits; true if all of it went. */
static bool flush(void)
{
	while (out_at < out_size) {
		ssize_t done = write(port, out_buffer + out_at, out_size - out_at);

		if (done > 0)
			out_at += (size_t)done;
		else if (done < 0 && errno == EINTR)
			continue;
		else
			return false;
	}
	out_at = out_size = 0;
	return true;
}

/* Makes frames of what there is to tell and writes them, until nothing is left or the host must
 * read first. */
static void tell(void)
{
	bool added;

	do {
		if (tell_broken && out_frame(CHANNEL_BROKEN, 0, NULL))
			tell_broken = false;
		if (tell_ready)
			out_ready();
		if (tell_pong && out_frame(CHANNEL_PONG, 0, NULL))
			tell_pong = false;
		for (size_t i = 0; i < CHANNEL_COMMANDS; i++) {
			struct command *command = &commands[(first + i) % CHANNEL_COMMANDS];

			if (command->started)
				out_command(command);
		}
		first = (first + 1) % CHANNEL_COMMANDS;
		added = out_at < out_size;
	} while (flush() && added);
}

/* ---- frames from the host ------------------------------------------------------------------ */

static struct command *find(uint32_t number)
{
	for (size_t i = 0; i < CHANNEL_COMMANDS; i++)
		if (commands[i].number == number)
			return &commands[i];
	return NULL;
}

static struct command *add(uint32_t number)
{
	struct command *command = find(0);

	if (command) {
		memset(command, 0, sizeof(*command));
		command->number = number;
		command->in = command->out[OUT] = command->out[ERR] = -1;
	}
	return command;
}

static bool take_hello(uint32_t number, const unsigned char *payload, size_t size)
{
	if (size != CHANNEL_HELLO_BYTES || !number)
		return false;
	for (size_t i = 0; i < CHANNEL_COMMANDS; i++)
		if (commands[i].number)
			drop(&commands[i]);
	session = number;
	tell_broken = tell_pong = false;
	tell_ready = true;
	if (get_number(payload + 4))
		tell_ready = host_resume((time_t)get_long(payload + 8),
					 (long)get_long(payload + 16), payload + 24);
	return true;
}

static bool take_spec(struct command *command, const unsigned char *payload, size_t size)
{
	char *longer;

	if (command->started || command->spec_size + size > CHANNEL_SPEC_LIMIT)
		return false;
	longer = realloc(command->spec, command->spec_size + size + 1);
	if (!longer) {
		command->error = ENOMEM;
		return true;
	}
	memcpy(longer + command->spec_size, payload, size);
	command->spec = longer;
	command->spec_size += size;
	command->spec[command->spec_size] = '\0';
	return true;
}

static bool take_start(struct command *command, const unsigned char *payload, size_t size)
{
	struct started started;

	if (command->started || size != 12)
		return false;
	command->started = true;
	command->credit[OUT] = get_number(payload + 4);
	command->credit[ERR] = get_number(payload + 8);
	if (command->error)
		return true;
	command->error = command_start(get_number(payload), command->spec, command->spec_size,
				       &started);
	forget_spec(command);
	if (command->error)
		return true;
	command->leader = started.leader;
	command->in = started.in;
	command->out[OUT] = started.out;
	command->out[ERR] = started.err;
	command->tell_complete = command->tell_end = true;
	return true;
}

static void feed(struct command *command)
{
	while (command->in >= 0 && command->pending_size) {
		ssize_t done = write(command->in, command->pending + command->pending_at,
				     command->pending_size);

		if (done > 0) {
			command->pending_at += (size_t)done;
			command->pending_size -= (size_t)done;
			command->taken += (uint32_t)done;
		} else if (done < 0 && errno == EINTR) {
			continue;
		} else if (done < 0 && errno == EAGAIN) {
			return;
		} else { /* the command has closed its stdin: what it does not read counts as taken */
			command->taken += (uint32_t)command->pending_size;
			close_in(command);
		}
	}
	free(command->pending);
	command->pending = NULL;
	command->pending_at = 0;
	if (command->in_ends)
		close_in(command);
}

static bool take_stdin(struct command *command, const unsigned char *payload, size_t size)
{
	if (!command->started || command->in_ends ||
	    command->pending_size + size > CHANNEL_STDIN_WINDOW)
		return false;
	if (command->in < 0) {
		command->taken += (uint32_t)size;
		return true;
	}
	if (!command->pending) {
		command->pending = malloc(CHANNEL_STDIN_WINDOW);
		if (!command->pending) {
			command_kill(command->leader, SIGKILL);
			return true;
		}
	}
	memmove(command->pending, command->pending + command->pending_at, command->pending_size);
	command->pending_at = 0;
	memcpy(command->pending + command->pending_size, payload, size);
	command->pending_size += size;
	feed(command);
	return true;
}

static bool take_credit(struct command *command, const unsigned char *payload, size_t size)
{
	if (size != 8)
		return false;
	for (int stream = 0; stream < STREAMS; stream++) {
		uint32_t more = get_number(payload + 4 * stream);

		if (__builtin_add_overflow(command->credit[stream], more, &command->credit[stream]))
			return false;
	}
	return true;
}

/* Carries out a frame; false if it makes no sense. Frames for a command that is gone are late. */
static bool take(uint32_t kind, uint32_t number, const unsigned char *payload, size_t size)
{
	struct command *command = number ? find(number) : NULL;

	if (kind == CHANNEL_PING) {
		tell_pong = true;
		return true;
	}
	if (!number || number == CHANNEL_MAGIC)
		return false;
	if (kind == CHANNEL_SPEC) {
		if (!command)
			command = add(number);
		return command && take_spec(command, payload, size);
	}
	if (!command)
		return kind > CHANNEL_START && kind <= CHANNEL_CLOSE;
	switch (kind) {
	case CHANNEL_START:
		return take_start(command, payload, size);
	case CHANNEL_STDIN:
		return take_stdin(command, payload, size);
	case CHANNEL_STDIN_END:
		command->in_ends = true;
		feed(command);
		return command->started;
	case CHANNEL_CREDIT:
		return take_credit(command, payload, size);
	case CHANNEL_SIGNAL:
		if (size != 4)
			return false;
		if (command->leader > 0)
			command_kill(command->leader, (int)get_number(payload));
		return true;
	case CHANNEL_CLOSE:
		drop(command);
		return true;
	}
	return false;
}

static bool is_hello(const unsigned char *header)
{
	return get_number(header) == CHANNEL_HELLO_BYTES &&
	       get_number(header + 8) == CHANNEL_MAGIC && get_number(header + 12) == CHANNEL_HELLO;
}

static void take_frames(void)
{
	size_t at = 0;

	while (in_size - at >= CHANNEL_HEADER_BYTES) {
		const unsigned char *header = in_buffer + at;
		uint32_t size = get_number(header), of = get_number(header + 4);
		bool hello = is_hello(header);

		if (!synchronised && !hello) {
			at++;
			continue;
		}
		if (size > CHANNEL_PAYLOAD_LIMIT) {
			synchronised = false;
			tell_broken = true;
			continue;
		}
		if (in_size - at < CHANNEL_HEADER_BYTES + size)
			break;
		at += CHANNEL_HEADER_BYTES + size;
		if (hello)
			synchronised = take_hello(of, header + CHANNEL_HEADER_BYTES, size);
		else if (of == session &&
			 !take(get_number(header + 12), get_number(header + 8),
			       header + CHANNEL_HEADER_BYTES, size)) {
			synchronised = false;
			tell_broken = true;
		}
	}
	memmove(in_buffer, in_buffer + at, in_size - at);
	in_size -= at;
}

static void read_port(void)
{
	ssize_t got;

	while ((got = read(port, in_buffer + in_size, sizeof(in_buffer) - in_size)) > 0) {
		in_size += (size_t)got;
		take_frames();
	}
}

/* ---- the main loop ------------------------------------------------------------------------- */

size_t channel_poll(struct pollfd *polled, int *timeout)
{
	size_t count = 0;
	bool room;

	if (port < 0)
		return 0;
	if (host_gone_until > uptime_ms()) {
		*timeout = HOST_GONE_MS;
	} else {
		polled[count++] = (struct pollfd){
			.fd = port,
			.events = (short)(POLLIN | (out_at < out_size ? POLLOUT : 0)),
		};
	}
	room = out_room(OUT_RESERVE) >= PIECE_BYTES;
	for (size_t i = 0; i < CHANNEL_COMMANDS; i++) {
		struct command *command = &commands[i];

		if (!command->number)
			continue;
		if (command->in >= 0 && command->pending_size)
			polled[count++] = (struct pollfd){ .fd = command->in, .events = POLLOUT };
		for (int stream = 0; stream < STREAMS; stream++)
			if (room && command->out[stream] >= 0 && command->credit[stream])
				polled[count++] = (struct pollfd){ .fd = command->out[stream],
								   .events = POLLIN };
	}
	return count;
}

void channel_serve(const struct pollfd *polled, size_t count)
{
	if (port < 0)
		return;
	if (count && polled[0].fd == port && polled[0].revents & (POLLHUP | POLLERR))
		host_gone_until = uptime_ms() + HOST_GONE_MS;
	read_port();
	for (size_t i = 0; i < CHANNEL_COMMANDS; i++)
		if (commands[i].number && commands[i].pending_size)
			feed(&commands[i]);
	tell();
}

void channel_child_changed(pid_t pid, int status)
{
	for (size_t i = 0; i < CHANNEL_COMMANDS; i++) {
		struct command *command = &commands[i];

		if (!command->number || command->leader != pid)
			continue;
		if (WIFSTOPPED(status)) {
			/* Whoever stops all processes does not mean the one that waits. */
			kill(pid, SIGCONT);
			return;
		}
		command->leader = 0;
		command->status = command_status(status);
		command->tell_exit = true;
		for (int stream = 0; stream < STREAMS; stream++)
			if (command->out[stream] < 0 ||
			    ioctl(command->out[stream], FIONREAD, &command->owed[stream]))
				command->owed[stream] = 0;
	}
}
