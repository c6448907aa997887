/* SPDX-License-Identifier: Apache-2.0 */
/* Cases of the harness `files`, taken apart: files-calls.h has the encoding. */
#ifndef KCOV_BRIDGE_AGENT_FILES_DECODE_H
#define KCOV_BRIDGE_AGENT_FILES_DECODE_H

#include "files-calls.h"

#include <stddef.h>
#include <stdint.h>

#define FILES_MOST_ARGUMENTS 5

/* Values of the list `time` that are no seconds. */
#define FILES_NOW INT64_MAX
#define FILES_OMIT (INT64_MAX - 1)

enum files_call_kind {
#define CALL(name, kinds) FILES_##name,
	FILES_CALLS
#undef CALL
		FILES_CALL_KINDS
};

struct files_call {
	uint8_t kind;	/* enum files_call_kind */
	uint8_t thread; /* 0 to FILES_THREADS - 1; 0 outside of parallel sections */
	/*
	 * By argument: of a slot its number, of a name its index, of an entry of a list the entry's
	 * value, of `open` flags for open(2), of `data` the length.
	 */
	int64_t values[FILES_MOST_ARGUMENTS];
	uint8_t index[FILES_MOST_ARGUMENTS]; /* of an entry in its list */
	uint16_t open;			     /* of the argument `open`: access mode, flags */
	const uint8_t *data;		     /* of the argument `data` */
};

struct files_case {
	size_t count;
	size_t left_out; /* records beyond FILES_MOST_CALLS */
	struct files_call calls[FILES_MOST_CALLS];
};

/* The paths of the names, by index. */
extern const char *const files_names[];
extern const size_t files_name_count;
/* The names of the calls, by kind. */
extern const char *const files_call_names[FILES_CALL_KINDS];

/*
 * Take a case apart. Each byte string is one. The bytes are changed: data of calls are unescaped
 * in place, and the calls point to them.
 */
void files_decode(uint8_t *data, size_t length, struct files_case *result);

/*
 * Write a call as bridge/fuzz/files_text.py does, without its thread; cut off at `size`. Returns
 * the length, as snprintf() does.
 */
size_t files_print(const struct files_call *call, char *text, size_t size);

#endif
