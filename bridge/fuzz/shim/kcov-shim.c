// SPDX-License-Identifier: Apache-2.0
/*
 * The program that a fuzzing engine of AFL's kind takes for its target. The target is a guest.
 *
 *	kcov-shim [FILE]
 *
 * It executes each of the engine's cases in a slot, the VM whose socket KCOV_BRIDGE_SLOT names: the
 * case goes into the lane (guest/agent/lane.h), and the PCs that the case covered are folded into
 * the engine's map. Between two executions it tells the slot what is new or wrong (messages.py).
 *
 * To the engine it is a fork server (descriptors 198 and 199), in the protocol that all versions
 * know, or with KCOV_BRIDGE_PROTOCOL=new in the one that AFL++ has had since 4.20c. The process
 * whose id the engine gets is a stand-in, which only sleeps. The engine kills it when a case takes
 * too long; that means: this VM's case is over, reset the VM. Without these descriptors the shim
 * executes one case and ends as the case did.
 *
 * Cases come from the engine's shared memory, or from FILE, or else from stdin.
 *
 * Trust: the slot is believed; the guest is not. Whatever lies in the region is read once, and
 * bounded by what the board says. Nothing is allocated after the start.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "board.h"
#include "lane.h"

/* What AFL++ and its targets have agreed on. */
#define ENGINE_REQUESTS		198
#define ENGINE_ANSWERS		199
#define ENGINE_CASE_BYTES	(1 << 20)
#define MAP_VARIABLE		"__AFL_SHM_ID"
#define CASE_VARIABLE		"__AFL_SHM_FUZZ_ID"
#define MAP_SIZE_VARIABLE	"AFL_MAP_SIZE"

#define OLD_HELLO		0x80000001U
#define OLD_MAP_SIZE(cells)	(0x40000000U | ((uint32_t)(cells) - 1) << 1)
#define OLD_MAP_SIZE_MOST	(1U << 23)
#define OLD_SHARED_CASES	0x01000000U

#define NEW_HELLO		0x41464c01U
#define NEW_MAP_SIZE		0x00000001U
#define NEW_SHARED_CASES	0x00000002U

#define PROTOCOL_VARIABLE	"KCOV_BRIDGE_PROTOCOL"

/* A fault was counted, but the case has not ended: so long it may take. */
#define FAULT_GRACE_NS		(50 * 1000000ULL)
#define SLEEP_LEAST_NS		20000ULL
#define SLEEP_MOST_NS		1000000ULL

/* The descriptors that come with "welcome"; the last one is missing where no target counts. */
enum { REGION_FD, BOARD_FD, FAULTS_FD, FDS };

enum outcome {
	DONE,
	KILLED,		/* the engine has killed the stand-in */
	FAULTED,	/* something went wrong, and the case does not end */
};

static struct kb_board *board;
static int slot = -1;			/* the slot's socket */

/* The region and what is in it, by the board. */
static char *region;
static uint64_t region_bytes;
static struct lane *lane;
static uint8_t *input;
static uint64_t input_bytes;
static struct {
	const uint64_t *words;
	uint64_t most;			/* PCs */
} area[KB_BOARD_AREAS];
static unsigned int areas;

/* The engine's side. */
static uint8_t *map;
static uint64_t cells;			/* of the map, that are used */
static uint8_t *seen;			/* cells that were ever set */
static bool blind;
static const uint8_t *engine_case;	/* a length of 32 bits, then the case; NULL: a file */
static const char *case_file;		/* NULL: stdin */

static pid_t stand_in;
/* The engine has the stand-in's pid for the present case, or there is no engine. */
static bool announced = true;
static volatile sig_atomic_t child_ended;

static uint64_t case_number, faults, since_reset;
/* A word that the target's process counts its faults in; NULL: the slot alone counts. */
static const uint64_t *target_faults;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static uint64_t load(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void store(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/*
 * All that went wrong so far. What the target notes before its answer, which the guest waits for, is
 * counted before the case is done (both are shared memory), so it is the case's.
 */
static uint64_t fault_count(void)
{
	return load(&board->faults) + (target_faults ? load(target_faults) : 0);
}

/* For words of the board that only the shim writes. */
static void add(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, *word + value, __ATOMIC_RELAXED);
}

/* Says why to the slot, since engines hide what their target writes. */
static __attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...)
{
	char text[KB_MESSAGE_BYTES] = "failed ";
	size_t used = strlen(text);
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text + used, sizeof(text) - used, format, arguments);
	va_end(arguments);
	fprintf(stderr, "kcov-shim: %s\n", text + used);
	if (slot >= 0)
		send(slot, text, strlen(text), MSG_NOSIGNAL);
	exit(2);
}

/* ---- the slot ---------------------------------------------------------------------------- */

/* The slot or the engine has ended: so does the shim, with its stand-in. */
static __attribute__((noreturn)) void leave(void)
{
	if (stand_in > 0) {
		kill(stand_in, SIGKILL);
		waitpid(stand_in, NULL, 0);
	}
	exit(0);
}

static __attribute__((format(printf, 1, 2))) void tell(const char *format, ...)
{
	char text[KB_MESSAGE_BYTES];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	while (send(slot, text, (size_t)length, MSG_NOSIGNAL) < 0) {
		if (errno != EINTR)
			leave();
	}
}

/* Waits for the slot's next message. Descriptors that did not come with it are -1. */
static size_t hear_slot(char text[KB_MESSAGE_BYTES], int fds[FDS])
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(FDS * sizeof(int))];
	} control;
	struct iovec data = { .iov_base = text, .iov_len = KB_MESSAGE_BYTES };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header;
	ssize_t length;

	do
		length = recvmsg(slot, &message, MSG_CMSG_CLOEXEC);
	while (length < 0 && errno == EINTR);
	if (length <= 0)
		leave();
	header = CMSG_FIRSTHDR(&message);
	for (unsigned int i = 0; i < FDS; i++)
		fds[i] = -1;
	if (header && header->cmsg_type == SCM_RIGHTS && header->cmsg_len >= CMSG_LEN(0) &&
	    header->cmsg_len <= CMSG_LEN(FDS * sizeof(int)))
		memcpy(fds, CMSG_DATA(header), header->cmsg_len - CMSG_LEN(0));
	return (size_t)length;
}

static bool is_welcome(const char *text, size_t length, const int fds[FDS])
{
	return length == 7 && !memcmp(text, "welcome", 7) && fds[BOARD_FD] >= 0;
}

/* Maps what the target counts its faults in, in the place of that of an earlier machine. */
static void map_target_faults(int fd)
{
	void *memory;

	if (target_faults)
		munmap((void *)target_faults, sizeof(*target_faults));
	target_faults = NULL;
	if (fd < 0)
		return;
	memory = mmap(NULL, sizeof(*target_faults), PROT_READ, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		fail("the count of the target's faults cannot be mapped: %s", strerror(errno));
	target_faults = memory;
	close(fd);
}

/* Maps the region, in the place of an earlier one: its layout is the same. */
static void map_region(int fd)
{
	struct stat state;
	void *memory;

	if (fstat(fd, &state) || (region && (uint64_t)state.st_size != region_bytes))
		fail("the slot's region cannot be used");
	region_bytes = (uint64_t)state.st_size;
	memory = mmap(region, region_bytes, PROT_READ | PROT_WRITE,
		      MAP_SHARED | (region ? MAP_FIXED : 0), fd, 0);
	if (memory == MAP_FAILED)
		fail("the slot's region cannot be mapped: %s", strerror(errno));
	region = memory;
	close(fd);
}

/*
 * Waits until the slot lets the shim continue. Meanwhile the lane is the slot's. With @settled, or if
 * it reset the guest, the slot knows of all faults so far; else one that was counted meanwhile is
 * still to be told.
 */
static void await_go(bool settled)
{
	uint64_t start = now(), epoch = load(&board->epoch), last_case;
	char text[KB_MESSAGE_BYTES];
	int fds[FDS];
	size_t length = hear_slot(text, fds);

	if (is_welcome(text, length, fds)) {
		/* Another machine. */
		map_region(fds[REGION_FD]);
		close(fds[BOARD_FD]);
		map_target_faults(fds[FAULTS_FD]);
		case_number = 0;
		settled = true;
	} else if (length != 2 || memcmp(text, "go", 2)) {
		fail("the slot answered %.*s, not go", (int)(length < 80 ? length : 80), text);
	}
	last_case = load(&board->last_case);
	if (last_case > case_number)
		case_number = last_case;
	if (settled || load(&board->epoch) != epoch)
		faults = fault_count();
	add(&board->ns_slot, now() - start);
}

/* The place of some bytes in the region. */
static void *place(uint64_t offset, uint64_t bytes, const char *what)
{
	if (offset > region_bytes || bytes > region_bytes - offset || offset % sizeof(uint64_t))
		fail("%s is not inside the region: %llu bytes at %llu of %llu", what,
		     (unsigned long long)bytes, (unsigned long long)offset,
		     (unsigned long long)region_bytes);
	return region + offset;
}

static void attach_slot(void)
{
	const char *path = getenv(KB_SLOT_VARIABLE);
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char text[KB_MESSAGE_BYTES];
	unsigned int i;
	int fds[FDS];

	if (!path)
		fail("%s is not set: it names the socket of a slot", KB_SLOT_VARIABLE);
	if (strlen(path) >= sizeof(address.sun_path))
		fail("the path of the slot's socket is too long: %s", path);
	strcpy(address.sun_path, path);
	slot = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (slot < 0 || connect(slot, (struct sockaddr *)&address, sizeof(address)))
		fail("no slot answers at %s: %s", path, strerror(errno));
	tell("hello %d %d", KB_BOARD_VERSION, (int)getpid());
	if (!is_welcome(text, hear_slot(text, fds), fds))
		fail("the slot did not say welcome");
	map_region(fds[REGION_FD]);
	board = mmap(NULL, KB_BOARD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fds[BOARD_FD], 0);
	if ((void *)board == MAP_FAILED)
		fail("the slot's board cannot be mapped: %s", strerror(errno));
	close(fds[BOARD_FD]);
	map_target_faults(fds[FAULTS_FD]);
	if (board->magic != KB_BOARD_MAGIC || board->version != KB_BOARD_VERSION)
		fail("the slot's board has another version");

	lane = place(board->lane_offset, sizeof(*lane), "the lane");
	input_bytes = board->input_bytes;
	input = place(board->input_offset, input_bytes, "the case");
	if (board->areas > KB_BOARD_AREAS || board->areas > LANE_MOST_AREAS)
		fail("the lane has too many trace areas");
	areas = (unsigned int)board->areas;
	for (i = 0; i < areas; i++) {
		uint64_t words = board->area[i].words;

		if (!words || words > region_bytes / sizeof(uint64_t))
			fail("a trace area has %llu words", (unsigned long long)words);
		area[i].words = place(board->area[i].offset, words * sizeof(uint64_t),
				      "a trace area");
		area[i].most = words - 1;
	}
	case_number = load(&board->last_case);
	faults = fault_count();
}

/* ---- the engine -------------------------------------------------------------------------- */

static void *attach_memory(const char *variable, uint64_t *bytes)
{
	const char *id = getenv(variable);
	struct shmid_ds state;
	void *memory;

	if (!id)
		return NULL;
	memory = shmat(atoi(id), NULL, 0);
	if (memory == (void *)-1 || shmctl(atoi(id), IPC_STAT, &state))
		fail("%s is %s, which is no shared memory: %s", variable, id, strerror(errno));
	*bytes = state.shm_segsz;
	return memory;
}

static void attach_engine(void)
{
	const char *wanted = getenv(MAP_SIZE_VARIABLE);
	uint64_t bytes = 0, most;

	cells = board->map_size;
	blind = board->blind;
	map = attach_memory(MAP_VARIABLE, &bytes);
	if (!map)
		map = calloc(1, bytes = cells);
	if (wanted && (most = strtoull(wanted, NULL, 10)) && most < cells)
		cells = most;
	if (bytes < cells)
		cells = bytes;
	if (cells > OLD_MAP_SIZE_MOST)
		cells = OLD_MAP_SIZE_MOST;
	seen = calloc(1, cells);
	if (!map || !seen || cells < 2)
		fail("a map of %llu cells cannot be used", (unsigned long long)cells);
	bytes = 0;
	engine_case = attach_memory(CASE_VARIABLE, &bytes);
	if (engine_case && bytes < sizeof(uint32_t) + ENGINE_CASE_BYTES)
		fail("the engine's memory for cases has only %llu bytes",
		     (unsigned long long)bytes);
}

static bool answer_words(const uint32_t *words, size_t number)
{
	ssize_t written;

	do
		written = write(ENGINE_ANSWERS, words, number * sizeof(*words));
	while (written < 0 && errno == EINTR);
	return written == (ssize_t)(number * sizeof(*words));
}

static bool answer(uint32_t word)
{
	return answer_words(&word, 1);
}

static bool hear(uint32_t *word)
{
	struct pollfd ends[] = {
		{ .fd = ENGINE_REQUESTS, .events = POLLIN },
		{ .fd = slot, .events = POLLIN },
	};
	ssize_t got;

	/* The slot says nothing by itself, so this is its end. */
	if (poll(ends, 2, -1) > 0 && ends[1].revents)
		leave();
	do
		got = read(ENGINE_REQUESTS, word, sizeof(*word));
	while (got < 0 && errno == EINTR);
	return got == sizeof(*word);
}

/* Returns whether there is an engine that wants a fork server. */
static bool shake_hands(void)
{
	const char *protocol = getenv(PROTOCOL_VARIABLE);
	uint32_t word;

	if (fcntl(ENGINE_ANSWERS, F_GETFD) < 0 || fcntl(ENGINE_REQUESTS, F_GETFD) < 0)
		return false;
	if (protocol && !strcmp(protocol, "new")) {
		if (!answer(NEW_HELLO) || !hear(&word))
			leave();
		if (word != ~NEW_HELLO)
			fail("the engine does not know the new protocol");
		if (!answer(NEW_MAP_SIZE | (engine_case ? NEW_SHARED_CASES : 0)) ||
		    !answer((uint32_t)cells) || !answer(NEW_HELLO))
			leave();
		return true;
	}
	word = OLD_HELLO | OLD_MAP_SIZE(cells);
	if (!engine_case)
		return answer(word);
	if (!answer(word | OLD_SHARED_CASES) || !hear(&word))
		leave();
	if (!(word & OLD_SHARED_CASES))
		fail("the engine offers memory for cases and does not use it");
	return true;
}

static void on_child(int number)
{
	(void)number;
	child_ended = 1;
}

static void start_stand_in(void)
{
	pid_t parent = getpid();

	child_ended = 0;
	stand_in = fork();
	if (stand_in < 0)
		fail("there can be no further process: %s", strerror(errno));
	if (!stand_in) {
		signal(SIGCHLD, SIG_DFL);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		prctl(PR_SET_NAME, "kcov-stand-in");
		close_range(0, ~0U, 0);
		while (getppid() == parent)
			pause();
		_exit(0);
	}
	store(&board->stand_in, (uint64_t)stand_in);
}

/* Gives the engine a pid to kill. From here on the case may take as long as the engine allows. */
static void announce(void)
{
	if (!announced && !answer((uint32_t)stand_in))
		leave();
	announced = true;
}

/* Tells the engine the end of the present case. One write wakes it once. */
static bool answer_status(uint32_t status)
{
	uint32_t words[] = { (uint32_t)stand_in, status };

	if (announced)
		return answer(status);
	announced = true;
	return answer_words(words, 2);
}

/* Returns whether the stand-in has ended. */
static bool stand_in_ended(void)
{
	if (!child_ended)
		return false;
	child_ended = 0;
	if (stand_in <= 0 || waitpid(stand_in, NULL, WNOHANG) != stand_in)
		return false;
	stand_in = 0;
	return true;
}

/* ---- one case ---------------------------------------------------------------------------- */

static uint64_t read_case(void)
{
	int fd = case_file ? open(case_file, O_RDONLY | O_CLOEXEC) : STDIN_FILENO;
	bool seeks = !case_file && lseek(fd, 0, SEEK_CUR) >= 0;
	uint64_t length = 0;
	uint8_t more;
	ssize_t got;

	if (fd < 0)
		fail("the case %s cannot be read: %s", case_file, strerror(errno));
	for (;;) {
		bool full = length == input_bytes;
		void *to = full ? &more : input + length;
		size_t room = full ? 1 : input_bytes - length;

		/* The engine has the same file open, and expects it at its beginning. */
		got = seeks ? pread(fd, to, room, (off_t)length) : read(fd, to, room);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			fail("the case cannot be read: %s", strerror(errno));
		if (full && got)
			add(&board->input_cut, 1);
		if (!got || full)
			break;
		length += (uint64_t)got;
	}
	if (case_file)
		close(fd);
	return length;
}

/* Puts the engine's case into the lane. Returns its length. */
static uint64_t take_case(void)
{
	uint32_t length;

	if (!engine_case)
		return read_case();
	memcpy(&length, engine_case, sizeof(length));
	if (length > ENGINE_CASE_BYTES)
		length = ENGINE_CASE_BYTES;
	if (length > input_bytes) {
		length = (uint32_t)input_bytes;
		add(&board->input_cut, 1);
	}
	memcpy(input, engine_case + sizeof(length), length);
	return length;
}

/* Waits until the slot has a runner that waits for a case. */
static void await_ready(void)
{
	uint64_t start = now();
	struct pollfd end = { .fd = slot, .events = POLLIN };
	bool waited = false;

	for (;;) {
		uint64_t state = load(&board->state);

		if (state == KB_BOARD_READY)
			break;
		if (state == KB_BOARD_GONE)
			leave();
		waited = true;
		if (poll(&end, 1, 1) > 0)
			leave();
	}
	if (waited)
		add(&board->ns_slot, now() - start);
}

/* Waits for the end of the present case. */
static enum outcome await_done(uint64_t epoch, bool *lost)
{
	uint64_t start = now(), spin = board->spin_ns, fault_at = 0;
	struct pollfd end = { .fd = slot, .events = POLLIN };
	unsigned int looks = 0;

	*lost = false;
	for (;;) {
		uint64_t elapsed, rest;
		struct timespec sleep;

		if (load(&lane->done) == case_number)
			return DONE;
		if (++looks % 32) {
			__builtin_ia32_pause();
			continue;
		}
		if (announced && stand_in_ended())
			return KILLED;
		if (load(&board->epoch) != epoch || load(&board->state) != KB_BOARD_READY) {
			*lost = true;
			return FAULTED;
		}
		elapsed = now() - start;
		if (fault_count() != faults) {
			if (!fault_at)
				fault_at = elapsed;
			if (elapsed - fault_at > FAULT_GRACE_NS)
				return FAULTED;
		}
		if (elapsed < spin) {
			/* The guest may want this processor. */
			sched_yield();
			continue;
		}
		announce();
		/* An eighth of the time so far: late by an eighth at most. */
		rest = elapsed / 8;
		rest = rest < SLEEP_LEAST_NS ? SLEEP_LEAST_NS : rest;
		rest = rest > SLEEP_MOST_NS ? SLEEP_MOST_NS : rest;
		sleep = (struct timespec){ .tv_nsec = (long)rest };
		if (ppoll(&end, 1, &sleep, NULL) > 0)
			leave();
		looks = 30;
	}
}

/* Spreads PCs, which have much in common, over 64 bits (the finalizer of splitmix64). */
static uint64_t hash(uint64_t pc)
{
	pc ^= pc >> 30;
	pc *= 0xbf58476d1ce4e5b9ULL;
	pc ^= pc >> 27;
	pc *= 0x94d049bb133111ebULL;
	return pc ^ pc >> 31;
}

/*
 * Counts each PC or edge in its cell. The count skips 0, so that a cell stays set. Returns whether a
 * cell is new.
 */
static bool fold_area(const uint64_t *pcs, uint64_t number, bool edges)
{
	/* Copies: the compiler must assume that a store into the map changes all that is global. */
	uint8_t *const counts = map, *const known = seen;
	const uint64_t size = cells;
	const bool counting = !blind;
	uint64_t previous = 0, fresh = 0, i;

	for (i = 0; i < number; i++) {
		uint64_t hashed = hash(__atomic_load_n(&pcs[i], __ATOMIC_RELAXED));
		uint64_t cell = ((hashed ^ previous) >> 32) * size >> 32;

		if (counting)
			counts[cell] = (uint8_t)(counts[cell] + 1 + (counts[cell] == 255));
		if (!known[cell]) {
			known[cell] = 1;
			fresh++;
		}
		/* Turned, so that A, B and B, A and A, A are three cells. */
		if (edges)
			previous = hashed << 1 | hashed >> 63;
	}
	if (fresh)
		add(&board->cells, fresh);
	return fresh;
}

/* Folds the present case's PCs into the map. Returns whether a cell was set for the first time. */
static bool fold(bool done)
{
	/* Whether a case has covered anything yet. */
	static bool covered;
	bool edges = board->fold == KB_FOLD_EDGES, fresh = false, empty = true;
	uint64_t used = load(&lane->areas_used);
	unsigned int i;

	/* A runner that never saw the case has left PCs of another. */
	if (!done && load(&lane->started) != case_number)
		return false;
	for (i = 0; i < areas && i < used; i++) {
		uint64_t number = load(done ? &lane->area_counts[i] : area[i].words);

		if (number >= area[i].most) {
			number = area[i].most;
			add(&board->overflows, 1);
		}
		fresh |= fold_area(area[i].words + 1, number, edges);
		empty = empty && !number;
	}
	covered = covered || !empty;
	/* An engine gives up where one of its seeds covers nothing. That is right if all do. */
	if (blind || (empty && covered))
		map[0] = 1;
	return fresh;
}

/* What became of the last case, until the slot knows it. */
static struct {
	enum outcome outcome;
	uint32_t status;
	bool fresh;
	bool told;
} last = { .told = true };

/* What the runner says, as a wait status of a process that has ended. */
static uint32_t sane_status(uint64_t status)
{
	uint32_t number = status & 0x7f;

	if (!number)
		return status & 0xff00;
	return number <= 64 ? number : SIGABRT;
}

static bool is_bad(uint32_t status)
{
	return WIFSIGNALED(status) || (status && board->exit_is_suspect);
}

/* To engines only a signal is a crash. */
static uint32_t engine_status(void)
{
	return is_bad(last.status) && !WIFSIGNALED(last.status) ? SIGABRT : last.status;
}

/* Executes the engine's case. */
static void execute(void)
{
	uint64_t length = take_case(), start, end;
	bool lost;

	for (;;) {
		uint64_t epoch = load(&board->epoch);

		await_ready();
		start = now();
		case_number++;
		store(&lane->length, length);
		store(&lane->flags, 0);
		store(&lane->case_number, case_number);
		last.outcome = await_done(epoch, &lost);
		end = now();
		add(&board->ns_guest, end - start);
		if (!lost)
			break;
		/* The slot reset the guest meanwhile, and may have used the lane. */
		add(&board->repeated, 1);
		announce();
		await_ready();
		length = take_case();
		if (load(&board->last_case) > case_number)
			case_number = load(&board->last_case);
	}
	last.status = last.outcome == DONE ? sane_status(load(&lane->status)) : SIGABRT;
	if (last.outcome == KILLED)
		last.status = SIGKILL;
	last.fresh = fold(last.outcome == DONE);
	last.told = false;
	if (last.outcome == DONE && !is_bad(last.status) && fault_count() != faults)
		last.status = SIGABRT;
	add(&board->ns_fold, now() - end);
	add(&board->executions, 1);
	since_reset++;
}

/* Tells the slot about the last case, if it is worth it, and lets it do what it must. */
static void report(void)
{
	unsigned long long number = case_number;
	bool settled = true;
	bool faulted = fault_count() != faults;

	if (last.fresh && !last.told)
		add(&board->new_cases, 1);
	if (!last.told && last.outcome == KILLED) {
		add(&board->timeouts, 1);
		since_reset = 0;
		tell("timeout %llu", number);
	} else if (faulted || (!last.told && last.outcome == FAULTED) ||
		   (!last.told && is_bad(last.status))) {
		add(&board->suspects, 1);
		since_reset = 0;
		if (last.outcome == DONE)
			tell("suspect %llu %u", number, sane_status(load(&lane->status)));
		else
			tell("suspect %llu none", number);
	} else if (!last.told && last.fresh) {
		tell("new %llu", number);
		settled = false;
	} else {
		last.told = true;
		return;
	}
	last.told = true;
	await_go(settled);
}

static __attribute__((noreturn)) void serve(void)
{
	uint64_t idle = now(), busy;
	uint32_t timed_out;

	while (hear(&timed_out)) {
		busy = now();
		add(&board->ns_engine, busy - idle);
		/* From here until the engine has the pid, its clock stands. */
		report();
		if (timed_out && stand_in) {
			/* The case ended first. Its process may not have, and would end the next one. */
			kill(stand_in, SIGKILL);
			waitpid(stand_in, NULL, 0);
			stand_in = 0;
		}
		if (stand_in_ended() || !stand_in)
			start_stand_in();
		if (board->reset_every && since_reset >= board->reset_every) {
			since_reset = 0;
			add(&board->resets, 1);
			tell("reset every");
			await_go(true);
		}
		await_ready();
		announced = false;
		execute();
		if (!answer_status(engine_status()))
			break;
		/*
		 * While the engine looks at the map. After a kill it may be about to end; whether
		 * the case was too slow shows with its next request.
		 */
		if (last.outcome != KILLED)
			report();
		idle = now();
	}
	leave();
}

/* Ends as the case did. */
static __attribute__((noreturn)) void end_like(uint32_t status)
{
	struct rlimit none = { 0, 0 };

	if (WIFSIGNALED(status)) {
		setrlimit(RLIMIT_CORE, &none);
		signal(WTERMSIG(status), SIG_DFL);
		kill(getpid(), WTERMSIG(status));
	}
	exit(WEXITSTATUS(status));
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_child };
	pid_t engine = getppid();

	if (argc > 2)
		fail("usage: kcov-shim [FILE]");
	case_file = argv[1];
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_TIMERSLACK, 1000UL);
	attach_slot();
	attach_engine();
	await_ready();
	if (shake_hands()) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != engine)
			leave();
		sigaction(SIGCHLD, &action, NULL);
		start_stand_in();
		serve();
	}
	/* afl-showmap offers memory for cases to such a target too, but leaves it empty. */
	engine_case = NULL;
	execute();
	report();
	end_like(last.status);
}
