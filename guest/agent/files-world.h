/* SPDX-License-Identifier: Apache-2.0 */
/* How the calls of a case are made, and what came of them: for harness-files.c. */
#ifndef KCOV_BRIDGE_AGENT_FILES_WORLD_H
#define KCOV_BRIDGE_AGENT_FILES_WORLD_H

#include "files-decode.h"

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct files_result {
	enum { NOT_MADE, MADE, LEFT_OUT } state; /* NOT_MADE: the case's time was over */
	int error;				 /* errno, or 0 */
	int64_t value;				 /* what the call returned */
	uint64_t hash;				 /* of what was read, in any order if it is names */
	uint32_t mode;				 /* of stat: type and permissions */
	uint32_t links;
	uint64_t size;
};

#define FILES_MOST_NODES 128 /* of a tree; more are not looked at */

struct files_node {
	char path[64]; /* the end of a longer one */
	uint32_t mode, links;
	uint64_t size, hash; /* hash of the contents, or of a link's */
};

struct files_tree {
	size_t count;
	struct files_node nodes[FILES_MOST_NODES]; /* sorted by path */
};

/* One side: what the case has open there, and what it may have made. */
struct files_world {
	int slots[FILES_SLOTS]; /* atomic; descriptor + 1, or 0 */
	uint32_t made;		/* atomic; names that were made, by index */
	bool moved;		/* atomic; anything may be anywhere: rename, links */
	uint8_t opened[FILES_SLOTS]; /* atomic; the name by which a slot was opened */
	uint32_t written;	/* atomic; names whose files may have other contents */
	bool changed;		/* atomic; the directory itself may be: its mode, owner, ... */
	struct timespec end;	/* no call begins after it */
	struct files_result results[FILES_MOST_CALLS];
	struct files_tree tree;
};

/* Catch SIGBUS of mappings whose file ends early. Returns 0, or -1 with errno. */
int files_begin_signals(void);

/* Begin a case, which has this time. */
void files_begin(struct files_world *world, double seconds);
/* Make a call in the working directory. Threads may do so at once. */
void files_make(struct files_world *world, const struct files_call *call,
		struct files_result *result);
/* Close what the case has open. */
void files_close(struct files_world *world);

/* Remove what the case has made. Returns whether the working directory should be empty. */
bool files_remove(struct files_world *world);
/*
 * The paths of names, in the working directory: files_names, or what files_find_fixed() has found.
 */
extern const char *files_paths[];

/*
 * Where nothing can be made, have the names stand for what is in the working directory. Returns the
 * number of files.
 */
size_t files_find_fixed(void);
/* What files_find_fixed() found, up to `size` bytes. Returns the length; 0 if it does not fit. */
size_t files_save_fixed(uint8_t *bytes, size_t size);
/* Take that in place of files_find_fixed(), which it is then like. */
size_t files_load_fixed(const uint8_t *bytes, size_t length);
/* Write what was in the files of these names, as far as the target lets it. */
void files_put_back(uint32_t names);
/* Make the same tree in an empty working directory. */
void files_copy_fixed(void);

/* Make a directory, in place of one that may be there, the working one. Returns whether it is. */
bool files_renew(const char *path);

/* Read the tree in the working directory. */
void files_walk(struct files_tree *tree);

/* Not to be compared: CALL, CALL.FIELD or CALL=ERRNO; CALL may be *. Returns false for nonsense. */
bool files_ignore(const char *what);
/* Whether the target refused a call in a way that is to be ignored, so that local leaves it out. */
bool files_left_out(const struct files_call *call, const struct files_result *result);
/* Write how the two sides differ, up to `size`. Returns the length; 0 if they do not. */
size_t files_compare(const struct files_case *present, const struct files_world *target,
		     const struct files_world *local, char *text, size_t size);

#endif
