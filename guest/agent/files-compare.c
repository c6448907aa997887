/* SPDX-License-Identifier: Apache-2.0 */
/* Compares what a case did on the target with what it did on a local file system. */
#define _GNU_SOURCE
#include "files-world.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum field { RESULT, ERRNO, DATA, TYPE, MODE, SIZE, NLINK, NAMES, FIELDS };

static const char *const field_names[FIELDS] = {
	[RESULT] = "result", [ERRNO] = "errno", [DATA] = "data",   [TYPE] = "type",
	[MODE] = "mode",     [SIZE] = "size",   [NLINK] = "nlink", [NAMES] = "names",
};

/* What is ignored stands behind the calls for the tree. */
enum { TREE = FILES_CALL_KINDS, SUBJECTS };

enum { MOST_REFUSALS = 64, MOST_ERRNO = 133 };

static unsigned int ignored[SUBJECTS]; /* by subject, bits of enum field */
static struct {
	int call; /* or -1 for each */
	int error;
} refusals[MOST_REFUSALS] = {{-1, EOPNOTSUPP}, {-1, ENOSYS}};
static int refusal_count = 2;

static const char *error_name(int error)
{
	const char *name = strerrorname_np(error);

	return name ? name : "?";
}

static int find_error(const char *name)
{
	for (int error = 1; error <= MOST_ERRNO; error++)
		if (!strcmp(error_name(error), name))
			return error;
	return 0;
}

/* The subject of this name; -1 for *, -2 for none. */
static int find_subject(const char *name, size_t length)
{
	if (length == 1 && *name == '*')
		return -1;
	if (length == 4 && !memcmp(name, "tree", 4))
		return TREE;
	for (int call = 0; call < FILES_CALL_KINDS; call++)
		if (strlen(files_call_names[call]) == length &&
		    !memcmp(files_call_names[call], name, length))
			return call;
	return -2;
}

bool files_ignore(const char *what)
{
	size_t length = strcspn(what, ".=");
	int subject = find_subject(what, length);
	unsigned int fields = ~0U;

	if (subject == -2)
		return false;
	if (what[length] == '=') {
		int error = find_error(what + length + 1);

		if (!error || subject == TREE || refusal_count == MOST_REFUSALS)
			return false;
		refusals[refusal_count].call = subject;
		refusals[refusal_count++].error = error;
		return true;
	}
	if (what[length] == '.') {
		fields = 0;
		for (int field = 0; field < FIELDS; field++)
			if (!strcmp(field_names[field], what + length + 1))
				fields = 1U << field;
		if (!fields)
			return false;
	}
	for (int i = 0; i < SUBJECTS; i++)
		if (subject == i || subject == -1)
			ignored[i] |= fields;
	return true;
}

bool files_left_out(const struct files_call *call, const struct files_result *result)
{
	if (result->state != MADE)
		return true;
	for (int i = 0; i < refusal_count; i++)
		if (result->error == refusals[i].error &&
		    (refusals[i].call == -1 || refusals[i].call == call->kind))
			return true;
	return false;
}

static bool counts(int subject, enum field field)
{
	return !(ignored[subject] >> field & 1);
}

/* The field in which two results differ, or FIELDS. */
static enum field find_difference(int call, const struct files_result *a,
				  const struct files_result *b)
{
	if (counts(call, RESULT) && (a->value != b->value))
		return RESULT;
	if (counts(call, ERRNO) && a->error != b->error)
		return ERRNO;
	if (counts(call, DATA) && a->hash != b->hash)
		return DATA;
	if (counts(call, TYPE) && (a->mode ^ b->mode) & 0170000)
		return TYPE;
	if (counts(call, MODE) && (a->mode ^ b->mode) & 07777)
		return MODE;
	if (counts(call, SIZE) && a->size != b->size)
		return SIZE;
	if (counts(call, NLINK) && a->links != b->links)
		return NLINK;
	return FIELDS;
}

static int print_result(char *text, size_t size, const char *side,
			const struct files_result *result)
{
	if (result->value < 0)
		return snprintf(text, size, "  %s: %lld %s\n", side, (long long)result->value,
				error_name(result->error));
	return snprintf(text, size,
			"  %s: %lld, data %016llx, type and mode %07o, size %llu, links %u\n", side,
			(long long)result->value, (unsigned long long)result->hash, result->mode,
			(unsigned long long)result->size, result->links);
}

static int print_node(char *text, size_t size, const char *side, const struct files_node *node)
{
	if (!node)
		return snprintf(text, size, "  %s: it does not exist\n", side);
	return snprintf(text, size,
			"  %s: data %016llx, type and mode %07o, size %llu, links %u\n", side,
			(unsigned long long)node->hash, node->mode,
			(unsigned long long)node->size, node->links);
}

static enum field find_node_difference(const struct files_node *a, const struct files_node *b)
{
	struct files_result left = {.hash = a->hash, .mode = a->mode, .size = a->size};
	struct files_result right = {.hash = b->hash, .mode = b->mode, .size = b->size};

	left.links = a->links;
	right.links = b->links;
	return find_difference(TREE, &left, &right);
}

static size_t compare_trees(const struct files_tree *target, const struct files_tree *local,
			    char *text, size_t size)
{
	size_t i = 0, j = 0;

	while (i < target->count || j < local->count) {
		const struct files_node *a = i < target->count ? &target->nodes[i] : NULL;
		const struct files_node *b = j < local->count ? &local->nodes[j] : NULL;
		int order = !a ? 1 : !b ? -1 : strcmp(a->path, b->path);
		enum field field = order ? NAMES : find_node_difference(a, b);
		size_t length;

		i += order <= 0;
		j += order >= 0;
		if (field == FIELDS || (field == NAMES && !counts(TREE, NAMES)))
			continue;
		a = order <= 0 ? a : NULL;
		b = order >= 0 ? b : NULL;
		length = snprintf(text, size, "difference in tree.%s: %s\n", field_names[field],
				  (a ? a : b)->path);
		length += print_node(text + length, size - length, "target", a);
		return length + print_node(text + length, size - length, "local ", b);
	}
	return 0;
}

size_t files_compare(const struct files_case *present, const struct files_world *target,
		     const struct files_world *local, char *text, size_t size)
{
	for (size_t i = 0; i < present->count; i++) {
		const struct files_call *call = &present->calls[i];
		const struct files_result *a = &target->results[i], *b = &local->results[i];
		char line[256];
		enum field field;
		size_t length;

		/* What follows may differ because of it. */
		if (a->state == NOT_MADE || b->state == NOT_MADE)
			return 0;
		if (b->state == LEFT_OUT)
			continue;
		field = find_difference(call->kind, a, b);
		if (field == FIELDS)
			continue;
		files_print(call, line, sizeof(line));
		length = snprintf(text, size, "difference in %s.%s: call %zu: %s\n",
				  files_call_names[call->kind], field_names[field], i + 1, line);
		length += print_result(text + length, size - length, "target", a);
		return length + print_result(text + length, size - length, "local ", b);
	}
	return compare_trees(&target->tree, &local->tree, text, size);
}
