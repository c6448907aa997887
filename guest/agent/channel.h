/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The frames between the bridge and process 1 of the guest, on the virtio-serial port CHANNEL_PORT.
 * bridge/vm/channel.py has the same numbers; tests/vm/test_channel.py compares them.
 *
 * A frame is a header and a payload. All numbers are little-endian. The host begins a session with
 * a HELLO, which names the session; frames of another session are dropped, so that nothing from
 * before a reset of the guest is mistaken for the present. The host numbers the commands.
 *
 *	host			guest
 *	HELLO		-->
 *			<--	READY		the report of a ready guest, JSON
 *	SPEC, START	-->			words, environment and directory of a command; start it
 *	STDIN		-->			at most CHANNEL_STDIN_WINDOW bytes that are not TAKEN
 *	STDIN_END	-->
 *			<--	TAKEN		so many bytes of stdin were passed on
 *	CREDIT		-->			so many bytes more of stdout and of stderr may come
 *			<--	STDOUT, STDERR
 *	SIGNAL		-->			for the process group of the command
 *			<--	FAILED		an errno: the command could not be started
 *			<--	EXIT		the status
 *			<--	COMPLETE	after EXIT: all that the command itself wrote has come
 *			<--	END		after COMPLETE: no process has its output open
 *	CLOSE		-->			kill the command if it runs; its number is not used again
 *	PING		-->
 *			<--	PONG
 *			<--	BROKEN		the guest lost track of the frames; it waits for a HELLO
 */
#ifndef KCOV_BRIDGE_AGENT_CHANNEL_H
#define KCOV_BRIDGE_AGENT_CHANNEL_H

#define CHANNEL_PORT "kcov-bridge.agent"
#define CHANNEL_VERSION 1

/* Header: size of the payload, session, command (0 for none), kind; 32 bits each. */
#define CHANNEL_HEADER_BYTES 16
/* A frame is one write to the port, of which the kernel takes 32 KiB at once. */
#define CHANNEL_PAYLOAD_LIMIT (32768 - CHANNEL_HEADER_BYTES)
#define CHANNEL_COMMANDS 64
#define CHANNEL_STDIN_WINDOW 65536
#define CHANNEL_SPEC_LIMIT (4 << 20)

/* The command in the header of a HELLO. A guest that lost track looks for it. */
#define CHANNEL_MAGIC 0x6f63766b
/* HELLO: version, whether to set the clock, seconds and nanoseconds (64 bits each), seed. */
#define CHANNEL_SEED_BYTES 32
#define CHANNEL_HELLO_BYTES (8 + 16 + CHANNEL_SEED_BYTES)

enum channel_kind {
	CHANNEL_HELLO = 1,
	/* Text that ends in a NUL byte, each behind a letter that says what it is:
	 * a a word, e a variable, c the directory. */
	CHANNEL_SPEC = 2,
	/* What to do, credit of stdout, credit of stderr. */
	CHANNEL_START = 3,
	CHANNEL_STDIN = 4,
	CHANNEL_STDIN_END = 5,
	CHANNEL_CREDIT = 6,
	CHANNEL_SIGNAL = 7,
	CHANNEL_CLOSE = 8,
	CHANNEL_PING = 9,

	CHANNEL_READY = 32,
	CHANNEL_STDOUT = 33,
	CHANNEL_STDERR = 34,
	CHANNEL_EXIT = 35,
	CHANNEL_COMPLETE = 36,
	CHANNEL_END = 37,
	CHANNEL_TAKEN = 38,
	CHANNEL_PONG = 39,
	CHANNEL_FAILED = 40,
	CHANNEL_BROKEN = 41,
};

/* What START does. */
enum channel_action {
	CHANNEL_EXECUTE = 1,	/* words: a program and its arguments */
	CHANNEL_PUT = 2,	/* words: path, temporary path, mode (octal); stdin: the content */
	CHANNEL_GET = 3,	/* words: path; stdout: the content */
	/* words: beginning of paths; stdout: the kernel's taint mask and its log, in lines, then
	 * NUL and a line for each file with such a path */
	CHANNEL_LOOK = 4,
};

/* The exit status of a command that did not begin: a start-up file of the shell ended it. */
#define CHANNEL_NOT_BEGUN 256

#endif
