/* SPDX-License-Identifier: Apache-2.0 */
/* Makes the calls of a case of the harness `files`, and tidies up after it. */
#define _GNU_SOURCE
#include "files-world.h"
#include "sweep.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

enum {
	BUFFER = 1 << 16,
	MOST_DEPTH = 8,	   /* of directories in a walk */
	MOST_ENTRIES = 24, /* of a walk: each costs a request; a target may serve endless trees */
	MOST_ROUNDS = 64,  /* of getdents */
};

/* Each thread has its own. */
static __thread uint8_t buffer[BUFFER];
static __thread sigjmp_buf *mapping_jump;

static void on_bus_error(int number)
{
	if (mapping_jump)
		siglongjmp(*mapping_jump, 1);
	/* Not of a mapping of ours: it ends the child, as it would without this handler. */
	signal(number, SIG_DFL);
	raise(number);
}

int files_begin_signals(void)
{
	/* SA_NODEFER: the jump need not restore the mask, which would cost a system call each time. */
	struct sigaction action = {.sa_handler = on_bus_error, .sa_flags = SA_NODEFER};

	return sigaction(SIGBUS, &action, NULL);
}

const char *files_paths[] = {
#define NAME(text, path) path,
	FILES_NAMES
#undef NAME
};

#define HASH_START 0xcbf29ce484222325ULL

static uint64_t hash_of(uint64_t hash, const void *data, size_t length)
{
	const uint8_t *bytes = data;

	for (size_t i = 0; i < length; i++)
		hash = (hash ^ bytes[i]) * 0x100000001b3ULL;
	return hash;
}

void files_begin(struct files_world *world, double seconds)
{
	/* The coarse clock is read without a system call in every guest. */
	clock_gettime(CLOCK_MONOTONIC_COARSE, &world->end);
	world->end.tv_sec += (time_t)seconds;
	world->end.tv_nsec += (long)((seconds - (time_t)seconds) * 1e9);
	world->made = 0;
	world->moved = world->changed = false;
	world->written = 0;
	memset(world->results, 0, sizeof(world->results));
}

static bool time_is_over(const struct files_world *world)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (now.tv_sec != world->end.tv_sec)
		return now.tv_sec > world->end.tv_sec;
	return now.tv_nsec > world->end.tv_nsec;
}

static int take(struct files_world *world, int64_t slot)
{
	return __atomic_load_n(&world->slots[slot], __ATOMIC_RELAXED) - 1;
}

/* Put a descriptor into a slot, or -1; what was there is closed. Returns what close did. */
static int put(struct files_world *world, int64_t slot, int fd)
{
	int old = __atomic_exchange_n(&world->slots[slot], fd + 1, __ATOMIC_RELAXED) - 1;

	if (old >= 0)
		return close(old);
	errno = EBADF;
	return -1;
}

void files_close(struct files_world *world)
{
	for (int slot = 0; slot < FILES_SLOTS; slot++)
		put(world, slot, -1);
}

static void note_made(struct files_world *world, int64_t name)
{
	__atomic_fetch_or(&world->made, 1U << name, __ATOMIC_RELAXED);
}

static void note_moved(struct files_world *world)
{
	__atomic_store_n(&world->moved, true, __ATOMIC_RELAXED);
}

/* Of a call that changes what is not the contents of a file: it may be the working directory. */
static int noted(struct files_world *world, const char *name, int value)
{
	if (!value && (!name || *name == '.' || world->moved))
		__atomic_store_n(&world->changed, true, __ATOMIC_RELAXED);
	return value;
}

/* What a call writes: fill, fill + 1, ... */
static const uint8_t *filled(unsigned int fill, size_t length)
{
	for (size_t i = 0; i < length; i++)
		buffer[i] = fill + i;
	return buffer;
}

static int64_t made_open(struct files_world *world, const struct files_call *call)
{
	int flags = call->values[2] | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	int fd = open(files_paths[call->values[1]], flags, (mode_t)call->values[3]);

	if (fd < 0)
		return -1;
	if (flags & O_CREAT)
		note_made(world, call->values[1]);
	__atomic_store_n(&world->opened[call->values[0]], call->values[1], __ATOMIC_RELAXED);
	put(world, call->values[0], fd);
	return 0;
}

/* Read or write a mapping of `length` bytes. */
static int64_t mapped(struct files_world *world, const struct files_call *call,
		      struct files_result *result)
{
	bool writes = call->kind != FILES_mread;
	size_t length = call->values[2];
	int protection = PROT_READ | (writes ? PROT_WRITE : 0);
	uint8_t *memory = mmap(NULL, length, protection, MAP_SHARED, take(world, call->values[0]),
			       call->values[1] & ~4095LL);
	volatile int64_t value = -1;
	sigjmp_buf jump;

	if (memory == MAP_FAILED)
		return -1;
	if (!sigsetjmp(jump, 0)) {
		mapping_jump = &jump;
		if (writes)
			for (size_t i = 0; i < length; i++)
				memory[i] = call->values[3] + i;
		else
			result->hash = hash_of(HASH_START, memory, length);
		value = 0;
	}
	mapping_jump = NULL;
	if (!value && call->kind == FILES_msync)
		value = msync(memory, length, MS_SYNC);
	else if (value)
		errno = EFAULT;
	int error = errno;
	munmap(memory, length);
	errno = error;
	return value;
}

struct directory_entry {
	uint64_t inode;
	int64_t offset;
	uint16_t length;
	uint8_t type;
	char name[];
};

/* Read a directory from where it is to its end. Returns the number of names, or -1. */
static int64_t read_names(int fd, struct files_result *result)
{
	int64_t names = 0;

	for (int round = 0; round < MOST_ROUNDS; round++) {
		long length = syscall(SYS_getdents64, fd, buffer, 4096);

		if (length <= 0)
			return length ? -1 : names;
		for (long at = 0; at < length;) {
			struct directory_entry *entry = (void *)(buffer + at);

			at += entry->length;
			if (sweep_is_dots(entry->name))
				continue;
			/* The order is the file system's: a sum. */
			result->hash += hash_of(HASH_START, entry->name, strlen(entry->name));
			names++;
		}
	}
	return names;
}

static void keep_stat(const struct stat *status, struct files_result *result)
{
	result->mode = status->st_mode;
	/* What a directory's are is the file system's own. */
	result->links = S_ISDIR(status->st_mode) ? 0 : status->st_nlink;
	result->size = S_ISDIR(status->st_mode) ? 0 : status->st_size;
}

/* List a directory and all below it, as `find` does. */
static int64_t list(int at, const char *name, int depth, int *left, struct files_result *result)
{
	int fd = openat(at, name,
			O_RDONLY | O_DIRECTORY | O_CLOEXEC | (depth ? O_NOFOLLOW : 0));
	DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;
	int error;

	if (!directory) {
		if (fd >= 0)
			close(fd);
		return -1;
	}
	while (errno = 0, (entry = readdir(directory)) && (*left)-- > 0) {
		struct stat status;
		uint64_t hash;

		if (sweep_is_dots(entry->d_name))
			continue;
		hash = hash_of(HASH_START, entry->d_name, strlen(entry->d_name));
		if (!fstatat(fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW)) {
			uint32_t type = status.st_mode & S_IFMT;

			hash = hash_of(hash, &type, sizeof(type));
			if (S_ISDIR(status.st_mode) && depth < MOST_DEPTH)
				list(fd, entry->d_name, depth + 1, left, result);
		}
		result->hash += hash;
	}
	error = errno;
	closedir(directory);
	errno = error;
	return error ? -1 : 0;
}

static struct timespec time_of(int64_t value)
{
	if (value == FILES_NOW)
		return (struct timespec){0, UTIME_NOW};
	if (value == FILES_OMIT)
		return (struct timespec){0, UTIME_OMIT};
	return (struct timespec){value, 0};
}

static const char *const xattr_names[] = {
#define ENTRY(list, text, value) ENTRY_##list(text)
#define ENTRY_xattr(text) text,
#define ENTRY_mode(text)
#define ENTRY_whence(text)
#define ENTRY_rename(text)
#define ENTRY_owner(text)
#define ENTRY_time(text)
#define ENTRY_xflag(text)
#define ENTRY_fallocate(text)
#define ENTRY_advice(text)
#define ENTRY_flock(text)
#define ENTRY_lock(text)
	FILES_ENTRIES
#undef ENTRY
};

static int64_t lock(struct files_world *world, const struct files_call *call)
{
	struct flock lock = {
		.l_type = call->values[1],
		.l_whence = SEEK_SET,
		.l_start = call->values[2],
		.l_len = call->values[3],
	};
	/* Of the open file: those of the process would never meet each other. */
	int command = call->kind == FILES_setlk ? F_OFD_SETLK : F_OFD_GETLK;

	return fcntl(take(world, call->values[0]), command, &lock);
}

/* Keep what a call read into the buffer. */
static int64_t read_into(struct files_result *result, int64_t length)
{
	if (length > 0)
		result->hash = hash_of(HASH_START, buffer, length);
	return length;
}

static int64_t kept_stat(struct files_result *result, const struct stat *status, int value)
{
	if (!value)
		keep_stat(status, result);
	return value;
}

static int64_t make(struct files_world *world, const struct files_call *call,
		    struct files_result *result)
{
	const int64_t *values = call->values;
	const char *name = files_paths[values[0] < (int64_t)files_name_count ? values[0] : 0];
	struct timespec times[2];
	struct statfs file_system;
	struct stat status;
	int left = MOST_ENTRIES;
	int fd, value;

	switch ((enum files_call_kind)call->kind) {
	case FILES_open:
		return made_open(world, call);
	case FILES_read:
		return read_into(result, read(take(world, values[0]), buffer, values[1]));
	case FILES_pread:
		return read_into(result,
				 pread(take(world, values[0]), buffer, values[1], values[2]));
	case FILES_write:
		return write(take(world, values[0]), filled(values[2], values[1]), values[1]);
	case FILES_pwrite:
		return pwrite(take(world, values[0]), filled(values[2], values[1]), values[1],
			      values[3]);
	case FILES_put:
		return write(take(world, values[0]), call->data, values[1]);
	case FILES_lseek:
		return lseek(take(world, values[0]), values[1], values[2]);
	case FILES_truncate:
		return truncate(name, values[1]);
	case FILES_ftruncate:
		return ftruncate(take(world, values[0]), values[1]);
	case FILES_rename:
		value = syscall(SYS_renameat2, AT_FDCWD, name, AT_FDCWD, files_paths[values[1]],
				values[2]);
		if (!value)
			note_moved(world);
		return value;
	case FILES_link:
		value = link(name, files_paths[values[1]]);
		if (!value)
			note_made(world, values[1]);
		return value;
	case FILES_symlink:
		value = symlink(name, files_paths[values[1]]);
		if (!value)
			note_moved(world);
		return value;
	case FILES_readlink:
		return read_into(result, readlink(name, (char *)buffer, BUFFER));
	case FILES_unlink:
		return unlink(name);
	case FILES_mkdir:
		value = mkdir(name, values[1]);
		if (!value)
			note_made(world, values[0]);
		return value;
	case FILES_rmdir:
		return rmdir(name);
	case FILES_list:
		return list(AT_FDCWD, name, 0, &left, result);
	case FILES_getdents:
		return read_names(take(world, values[0]), result);
	case FILES_stat:
		value = stat(name, &status);
		return kept_stat(result, &status, value);
	case FILES_lstat:
		value = lstat(name, &status);
		return kept_stat(result, &status, value);
	case FILES_fstat:
		value = fstat(take(world, values[0]), &status);
		return kept_stat(result, &status, value);
	case FILES_statfs:
		return statfs(name, &file_system);
	case FILES_access:
		return access(name, values[1] >> 6 & 7);
	case FILES_chmod:
		return noted(world, name, chmod(name, values[1]));
	case FILES_fchmod:
		return noted(world, NULL, fchmod(take(world, values[0]), values[1]));
	case FILES_chown:
		return noted(world, name, lchown(name, values[1], values[1]));
	case FILES_utimens:
	case FILES_futimens:
		times[0] = time_of(values[1]);
		times[1] = time_of(values[2]);
		if (call->kind == FILES_utimens)
			return utimensat(AT_FDCWD, name, times, 0);
		return futimens(take(world, values[0]), times);
	case FILES_setxattr:
		value = setxattr(name, xattr_names[values[1]], filled(values[3], values[2]),
				 values[2], values[4]);
		return noted(world, name, value);
	case FILES_getxattr:
		return read_into(result,
				 getxattr(name, xattr_names[values[1]], buffer, values[2]));
	case FILES_listxattr:
		return listxattr(name, (char *)buffer, values[1]) < 0 ? -1 : 0;
	case FILES_removexattr:
		return removexattr(name, xattr_names[values[1]]);
	case FILES_mread:
	case FILES_mwrite:
	case FILES_msync:
		return mapped(world, call, result);
	case FILES_fsync:
		return fsync(take(world, values[0]));
	case FILES_fdatasync:
		return fdatasync(take(world, values[0]));
	case FILES_syncfs:
		return syncfs(take(world, values[0]));
	case FILES_fallocate:
		return fallocate(take(world, values[0]), values[1], values[2], values[3]);
	case FILES_copy:
		return copy_file_range(take(world, values[0]), NULL, take(world, values[1]), NULL,
				       values[2], 0);
	case FILES_sendfile:
		return sendfile(take(world, values[0]), take(world, values[1]), NULL, values[2]);
	case FILES_advise:
		errno = posix_fadvise(take(world, values[0]), values[2], values[3], values[1]);
		return errno ? -1 : 0;
	case FILES_flock:
		return flock(take(world, values[0]), values[1]);
	case FILES_setlk:
	case FILES_getlk:
		return lock(world, call);
	case FILES_dup:
		fd = fcntl(take(world, values[0]), F_DUPFD_CLOEXEC, 3);
		if (fd < 0)
			return -1;
		__atomic_store_n(&world->opened[values[1]], world->opened[values[0]],
				 __ATOMIC_RELAXED);
		put(world, values[1], fd);
		return 0;
	case FILES_close:
		return put(world, values[0], -1);
	case FILES_parallel:
	case FILES_join:
	case FILES_CALL_KINDS:
		break;
	}
	return 0;
}

static uint32_t bit_of_slot(const struct files_world *world, int64_t slot)
{
	return 1U << __atomic_load_n(&world->opened[slot], __ATOMIC_RELAXED);
}

/* The names whose files a call changes, as bits. */
static uint32_t changed_names(const struct files_world *world, const struct files_call *call)
{
	const int64_t *values = call->values;

	switch ((enum files_call_kind)call->kind) {
	case FILES_open:
		return values[2] & O_TRUNC ? 1U << values[1] : 0;
	case FILES_truncate:
	case FILES_unlink:
		return 1U << values[0];
	case FILES_rename:
		return 1U << values[0] | 1U << values[1];
	case FILES_write:
	case FILES_pwrite:
	case FILES_put:
	case FILES_ftruncate:
	case FILES_mwrite:
	case FILES_msync:
	case FILES_fallocate:
	case FILES_sendfile:
		return bit_of_slot(world, values[0]);
	case FILES_copy:
		return bit_of_slot(world, values[1]);
	default:
		return 0;
	}
}

void files_make(struct files_world *world, const struct files_call *call,
		struct files_result *result)
{
	if (time_is_over(world))
		return;
	errno = 0;
	result->value = make(world, call, result);
	result->error = result->value < 0 ? errno : 0;
	result->state = MADE;
	if (result->value >= 0)
		__atomic_fetch_or(&world->written, changed_names(world, call), __ATOMIC_RELAXED);
}

bool files_remove(struct files_world *world)
{
	if (world->moved)
		return false;
	/* What lies deepest first. */
	for (int depth = 2; depth >= 0; depth--) {
		for (size_t i = 0; i < files_name_count; i++) {
			int slashes = 0;

			if (!(world->made >> i & 1))
				continue;
			for (const char *c = files_names[i]; *c; c++)
				slashes += *c == '/' && c[1];
			if (slashes == depth && !sweep_remove(AT_FDCWD, files_names[i]))
				return false;
		}
	}
	return true;
}

bool files_renew(const char *path)
{
	if (!chdir(path) && (!sweep_all() || chdir("/") || rmdir(path)))
		return false;
	return !mkdir(path, 0777) && !chdir(path);
}

static uint64_t contents(int at, const char *name, const struct stat *status)
{
	uint64_t hash = HASH_START;
	ssize_t length;
	int fd;

	if (S_ISLNK(status->st_mode)) {
		length = readlinkat(at, name, (char *)buffer, BUFFER);
		return length > 0 ? hash_of(hash, buffer, length) : 0;
	}
	if (!S_ISREG(status->st_mode))
		return 0;
	fd = openat(at, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return 0;
	/* The first mebibyte: files may have holes of any size. */
	for (int i = 0; i < 16 && (length = read(fd, buffer, BUFFER)) > 0; i++)
		hash = hash_of(hash, buffer, length);
	close(fd);
	return hash;
}

static void walk(int at, const char *name, const char *prefix, int depth, struct files_tree *tree)
{
	int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;

	if (!directory) {
		if (fd >= 0)
			close(fd);
		return;
	}
	while (tree->count < FILES_MOST_NODES && (entry = readdir(directory))) {
		struct files_node *node = &tree->nodes[tree->count];
		char path[PATH_MAX];
		struct stat status;
		size_t length, skipped;

		if (sweep_is_dots(entry->d_name) ||
		    fstatat(fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW))
			continue;
		length = snprintf(path, sizeof(path), "%s%s", prefix, entry->d_name);
		if (length + 1 >= sizeof(path))
			continue;
		memset(node, 0, sizeof(*node));
		skipped = length < sizeof(node->path) ? 0 : length + 1 - sizeof(node->path);
		memcpy(node->path, path + skipped, length - skipped);
		node->mode = status.st_mode;
		node->links = S_ISDIR(status.st_mode) ? 0 : status.st_nlink;
		node->size = S_ISDIR(status.st_mode) ? 0 : status.st_size;
		node->hash = contents(fd, entry->d_name, &status);
		tree->count++;
		if (S_ISDIR(status.st_mode) && depth < MOST_DEPTH) {
			strcpy(path + length, "/");
			walk(fd, entry->d_name, path, depth + 1, tree);
		}
	}
	closedir(directory);
}

static int by_path(const void *a, const void *b)
{
	const struct files_node *left = a, *right = b;

	return strcmp(left->path, right->path);
}

void files_walk(struct files_tree *tree)
{
	tree->count = 0;
	walk(AT_FDCWD, ".", "", 0, tree);
	qsort(tree->nodes, tree->count, sizeof(tree->nodes[0]), by_path);
}
