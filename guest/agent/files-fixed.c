/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For targets in which nothing can be made: the names of the cases stand for files and directories
 * that are there.
 */
#define _GNU_SOURCE
#include "files-world.h"
#include "sweep.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	/* Each costs requests to the target, after each reset; and it may serve endless trees. */
	MOST_FOUND = 96,
	MOST_EACH = 12, /* of one directory */
	MOST_DEPTH = 4,
	MOST_BYTES = 1 << 14, /* of a file that are put back */
};

/* The names that stand for files, and for directories. */
static const char *const file_names[] = {"a", "b", "c", "d/a", "d/b", "d/e/a", "e/a", "a/"};
static const char *const directory_names[] = {"d", "e", "d/e", "d/"};

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

static struct found {
	char *path;
	bool directory;
} found[MOST_FOUND];
static size_t found_count;

/* The files that names stand for, as they were. */
static struct original {
	const char *path;
	uint32_t names; /* that stand for it, as bits */
	uint32_t mode;
	size_t length;
	uint8_t *data;
} originals[ARRAY_SIZE(file_names)];
static size_t original_count;

/* What a name is: DT_REG, DT_DIR or another. Many file systems say it with the name. */
static int type_of(const struct dirent *entry, const char *path)
{
	struct stat status;

	if (entry->d_type != DT_UNKNOWN)
		return entry->d_type;
	return lstat(path, &status) ? DT_UNKNOWN : IFTODT(status.st_mode);
}

static void find(const char *path, int depth)
{
	DIR *directory = opendir(path);
	struct dirent *entry;
	size_t first = found_count;

	for (int left = MOST_EACH; directory && left > 0 && found_count < MOST_FOUND;) {
		char *name;
		int type;

		entry = readdir(directory);
		if (!entry)
			break;
		if (sweep_is_dots(entry->d_name) ||
		    asprintf(&name, "%s%s%s", depth ? path : "", depth ? "/" : "", entry->d_name) < 0)
			continue;
		type = type_of(entry, name);
		if (type != DT_REG && type != DT_DIR) {
			free(name);
			continue;
		}
		found[found_count].directory = type == DT_DIR;
		found[found_count++].path = name;
		left--;
	}
	if (directory)
		closedir(directory);
	for (size_t i = first, end = found_count; depth < MOST_DEPTH && i < end; i++)
		if (found[i].directory)
			find(found[i].path, depth + 1);
}

static int by_path(const void *a, const void *b)
{
	const struct found *left = a, *right = b;

	if (left->directory != right->directory)
		return left->directory - right->directory;
	return strcmp(left->path, right->path);
}

/* While what was found is loaded: what is left of it. */
static const uint8_t *loading, *loading_end;

/* An original as it is saved, its data after it. Without data it cannot be put back. */
struct saved {
	uint32_t present, mode, length;
};

static bool take(void *data, size_t length)
{
	if (length > (size_t)(loading_end - loading))
		return false;
	memcpy(data, loading, length);
	loading += length;
	return true;
}

/* Keep what was saved of a file. Returns whether it can be put back. */
static bool load(const char *path)
{
	struct original *original = &originals[original_count];
	struct saved saved;

	if (!take(&saved, sizeof(saved)) || !saved.present || saved.length >= MOST_BYTES)
		return false;
	original->data = malloc(saved.length + 1);
	if (!original->data || !take(original->data, saved.length)) {
		free(original->data);
		return false;
	}
	original->path = path;
	original->mode = saved.mode;
	original->length = saved.length;
	original_count++;
	return true;
}

/* Keep what is in a file. Returns whether it can be put back. */
static bool keep(const char *path)
{
	struct original *original = &originals[original_count];
	struct stat status;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	ssize_t length = -1;

	original->data = malloc(MOST_BYTES);
	if (fd >= 0 && original->data && !fstat(fd, &status))
		length = read(fd, original->data, MOST_BYTES);
	if (fd >= 0)
		close(fd);
	/* A longer one cannot be put back, so it stays as a case leaves it. */
	if (length < 0 || length == MOST_BYTES) {
		free(original->data);
		return false;
	}
	original->path = path;
	original->mode = status.st_mode & 07777;
	original->length = length;
	original_count++;
	return true;
}

/* The paths for which assign() asked whether they can be kept, in order. */
static const char *asked[ARRAY_SIZE(file_names)];
static size_t asked_count;

static bool ask(const char *path)
{
	asked[asked_count++] = path;
	return loading ? load(path) : keep(path);
}

/* Have names stand for `count` paths from `first` on, spread over them. */
static void assign(const char *const *names, size_t name_count, size_t first, size_t count)
{
	const char *last = NULL;
	bool kept = false;

	for (size_t i = 0; i < name_count && count; i++) {
		const char *path = found[first + i * count / name_count].path;
		bool slash = names[i][strlen(names[i]) - 1] == '/';
		char *copy;

		if (asprintf(&copy, "%s%s", path, slash ? "/" : "") < 0)
			continue;
		/* Paths come in order, so the same ones follow each other. */
		if (path != last)
			kept = names == file_names && ask(path);
		last = path;
		for (size_t name = 0; name < files_name_count; name++) {
			if (strcmp(files_names[name], names[i]))
				continue;
			files_paths[name] = copy;
			if (kept)
				originals[original_count - 1].names |= 1U << name;
		}
	}
}

/* Have the names stand for what was found. Returns the number of files. */
static size_t assign_all(void)
{
	size_t files = 0;

	while (files < found_count && !found[files].directory)
		files++;
	assign(file_names, ARRAY_SIZE(file_names), 0, files);
	assign(directory_names, ARRAY_SIZE(directory_names), files, found_count - files);
	return files;
}

size_t files_find_fixed(void)
{
	find(".", 0);
	qsort(found, found_count, sizeof(found[0]), by_path);
	return assign_all();
}

static bool put(uint8_t **at, const uint8_t *end, const void *data, size_t length)
{
	if (length > (size_t)(end - *at))
		return false;
	memcpy(*at, data, length);
	*at += length;
	return true;
}

size_t files_save_fixed(uint8_t *bytes, size_t size)
{
	const uint8_t *end = bytes + size;
	uint8_t *at = bytes;

	for (size_t i = 0; i < found_count; i++) {
		const uint8_t kind = found[i].directory ? 'd' : 'f';

		if (!put(&at, end, &kind, 1) ||
		    !put(&at, end, found[i].path, strlen(found[i].path) + 1))
			return 0;
	}
	if (!put(&at, end, "", 1))
		return 0;
	/* In the order in which assign() asks for them. */
	for (size_t i = 0, next = 0; i < asked_count; i++) {
		const struct original *original = next < original_count ? &originals[next] : NULL;
		struct saved saved = {0};

		if (original && original->path == asked[i]) {
			saved = (struct saved){1, original->mode, original->length};
			next++;
		}
		if (!put(&at, end, &saved, sizeof(saved)) ||
		    (saved.present && !put(&at, end, original->data, saved.length)))
			return 0;
	}
	return at - bytes;
}

size_t files_load_fixed(const uint8_t *bytes, size_t length)
{
	uint8_t kind;
	size_t files;

	loading = bytes;
	loading_end = bytes + length;
	while (take(&kind, 1) && kind && found_count < MOST_FOUND) {
		size_t rest = loading_end - loading, path = strnlen((const char *)loading, rest);

		if (path == rest)
			break;
		found[found_count].directory = kind == 'd';
		found[found_count].path = strdup((const char *)loading);
		if (!found[found_count].path)
			break;
		found_count++;
		loading += path + 1;
	}
	files = assign_all();
	loading = NULL;
	return files;
}

void files_put_back(uint32_t names)
{
	for (size_t i = 0; i < original_count; i++) {
		const struct original *original = &originals[i];
		ssize_t written;
		int fd;

		if (!(original->names & names))
			continue;
		fd = open(original->path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK,
			  original->mode);
		if (fd < 0)
			continue;
		written = pwrite(fd, original->data, original->length, 0);
		/* Some targets do not shorten files. The reset of the target does the rest. */
		if (written == (ssize_t)original->length && ftruncate(fd, written))
			written = -1;
		close(fd);
	}
}

void files_copy_fixed(void)
{
	for (size_t i = 0; i < found_count; i++)
		for (char *slash = found[i].path; (slash = strchr(slash, '/')); slash++) {
			*slash = 0;
			mkdir(found[i].path, 0755);
			*slash = '/';
		}
	for (size_t i = 0; i < found_count; i++)
		if (found[i].directory)
			mkdir(found[i].path, 0755);
	files_put_back(~0U);
}
