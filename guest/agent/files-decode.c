/* SPDX-License-Identifier: Apache-2.0 */
/* The decoder of the cases of the harness `files`, and the text of a call. */
#define _GNU_SOURCE
#include "files-decode.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/xattr.h>
#include <linux/falloc.h>

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* Kinds of arguments: those with rules of their own, then those with a list of entries. */
enum kind { NONE, SLOT, NAME, NUMBER, LENGTH, FILL, OPEN, DATA, LISTS };

static const char *const kind_names[] = {
	[SLOT] = "slot",     [NAME] = "name", [NUMBER] = "number", [LENGTH] = "length",
	[FILL] = "fill",     [OPEN] = "open", [DATA] = "data",
};

const char *const files_call_names[FILES_CALL_KINDS] = {
#define CALL(name, kinds) #name,
	FILES_CALLS
#undef CALL
};

static const char *const call_arguments[FILES_CALL_KINDS] = {
#define CALL(name, kinds) kinds,
	FILES_CALLS
#undef CALL
};

static const char *const name_texts[] = {
#define NAME(text, path) text,
	FILES_NAMES
#undef NAME
};

const char *const files_names[] = {
#define NAME(text, path) path,
	FILES_NAMES
#undef NAME
};

const size_t files_name_count = ARRAY_SIZE(files_names);

static const int64_t specials[] = {
#define SPECIAL(value) value,
	FILES_SPECIALS
#undef SPECIAL
};

static const struct {
	const char *text;
	int flag;
} open_flags[] = {
#define OPEN_FLAG(text, flag) {text, flag},
	FILES_OPEN_FLAGS
#undef OPEN_FLAG
};

_Static_assert(ARRAY_SIZE(open_flags) <= 14, "the flags of open have 14 bits");
_Static_assert(ARRAY_SIZE(files_names) <= 32, "files_world.made has a bit for each name");
_Static_assert(FILES_CALL_KINDS <= 64, "a call has 6 bits");

static const struct {
	const char *list, *text;
	int64_t value;
} entries[] = {
#define ENTRY(list, text, value) {#list, text, value},
	FILES_ENTRIES
#undef ENTRY
};

/* Made once of the strings above: the kinds of each call's arguments. */
static struct argument {
	enum kind kind;
	uint8_t first, count; /* of a list: its entries */
} arguments[FILES_CALL_KINDS][FILES_MOST_ARGUMENTS];

static struct argument find_argument(const char *name, size_t length)
{
	struct argument found = {NONE, 0, 0};

	for (int kind = SLOT; kind < LISTS; kind++)
		if (strlen(kind_names[kind]) == length && !memcmp(kind_names[kind], name, length))
			found.kind = kind;
	for (size_t i = 0; i < ARRAY_SIZE(entries); i++) {
		if (strlen(entries[i].list) != length || memcmp(entries[i].list, name, length))
			continue;
		if (!found.count)
			found.first = i;
		found.kind = LISTS;
		found.count++;
	}
	return found;
}

__attribute__((constructor)) static void find_arguments(void)
{
	for (int call = 0; call < FILES_CALL_KINDS; call++) {
		const char *text = call_arguments[call];

		for (int i = 0; *text && i < FILES_MOST_ARGUMENTS; i++) {
			size_t length = strcspn(text, " ");

			arguments[call][i] = find_argument(text, length);
			text += length + (text[length] == ' ');
		}
	}
}

/* A record while it is read. */
struct record {
	const uint8_t *next, *end;
};

static unsigned int byte(struct record *record)
{
	return record->next < record->end ? *record->next++ : 0;
}

static unsigned int two_bytes(struct record *record)
{
	unsigned int low = byte(record);

	return low | byte(record) << 8;
}

static int64_t number(unsigned int encoded)
{
	if (encoded < FILES_SPECIAL)
		return encoded;
	return specials[(encoded - FILES_SPECIAL) % ARRAY_SIZE(specials)];
}

static int64_t open_mode(unsigned int encoded)
{
	static const int modes[] = {O_RDONLY, O_WRONLY, O_RDWR, O_RDWR};
	int flags = modes[encoded & 3];

	for (size_t i = 0; i < ARRAY_SIZE(open_flags); i++)
		if (encoded >> (2 + i) & 1)
			flags |= open_flags[i].flag;
	return flags;
}

static void decode_argument(struct record *record, struct files_call *call, int at)
{
	const struct argument *argument = &arguments[call->kind][at];
	int64_t *value = &call->values[at];

	switch (argument->kind) {
	case NONE:
		break;
	case SLOT:
		*value = byte(record) % FILES_SLOTS;
		break;
	case NAME:
		*value = byte(record) % ARRAY_SIZE(files_names);
		break;
	case NUMBER:
		*value = number(two_bytes(record));
		break;
	case LENGTH:
		*value = two_bytes(record);
		break;
	case FILL:
		*value = byte(record);
		break;
	case OPEN:
		call->open = two_bytes(record);
		*value = open_mode(call->open);
		break;
	case DATA:
		call->data = record->next;
		*value = record->end - record->next;
		if (*value > FILES_MOST_DATA)
			*value = FILES_MOST_DATA;
		break;
	case LISTS:
		call->index[at] = byte(record) % argument->count;
		*value = entries[argument->first + call->index[at]].value;
		break;
	}
}

/* Remove the escapes of a record in place. Returns its length. */
static size_t unescape(uint8_t *record, size_t length)
{
	size_t to = 0;

	for (size_t from = 0; from < length; from++) {
		if (record[from] != FILES_ESCAPE)
			record[to++] = record[from];
		else if (++from < length)
			record[to++] = record[from] ^ FILES_ESCAPE_XOR;
	}
	return to;
}

void files_decode(uint8_t *data, size_t length, struct files_case *result)
{
	uint8_t *end = data + length;
	bool parallel = false;

	result->count = result->left_out = 0;
	for (uint8_t *next; data < end; data = next) {
		uint8_t *separator = memchr(data, FILES_SEPARATOR, end - data);
		struct files_call *call = &result->calls[result->count];
		struct record record = {data, NULL};
		unsigned int first;
		int kind;

		next = separator ? separator + 1 : end;
		record.end = data + unescape(data, (separator ? separator : end) - data);
		if (record.next == record.end)
			continue;
		first = byte(&record);
		kind = (first & 63) % FILES_CALL_KINDS;
		/* Sections do not nest. */
		if ((kind == FILES_parallel && parallel) || (kind == FILES_join && !parallel))
			continue;
		if (result->count == FILES_MOST_CALLS) {
			result->left_out++;
			continue;
		}
		memset(call, 0, sizeof(*call));
		call->kind = kind;
		if (kind == FILES_parallel || kind == FILES_join)
			parallel = kind == FILES_parallel;
		else if (parallel)
			call->thread = first >> 6;
		for (int i = 0; i < FILES_MOST_ARGUMENTS; i++)
			decode_argument(&record, call, i);
		result->count++;
	}
}

struct text {
	char *next;
	size_t left, length;
};

__attribute__((format(printf, 2, 3))) static void print(struct text *text, const char *format, ...)
{
	va_list list;
	int length;

	va_start(list, format);
	length = vsnprintf(text->next, text->left, format, list);
	va_end(list);
	if (length < 0)
		return;
	text->length += length;
	if ((size_t)length >= text->left)
		length = text->left ? text->left - 1 : 0;
	text->next += length;
	text->left -= length;
}

static void print_open(struct text *text, unsigned int encoded)
{
	static const char *const modes[] = {"r", "w", "rw", "rw"};

	print(text, "%s", modes[encoded & 3]);
	for (size_t i = 0; i < ARRAY_SIZE(open_flags); i++)
		if (encoded >> (2 + i) & 1)
			print(text, "|%s", open_flags[i].text);
}

static void print_data(struct text *text, const uint8_t *data, size_t length)
{
	print(text, "\"");
	for (size_t i = 0; i < length; i++) {
		if (data[i] == '"' || data[i] == '\\')
			print(text, "\\%c", data[i]);
		else if (data[i] >= 0x20 && data[i] < 0x7f)
			print(text, "%c", data[i]);
		else
			print(text, "\\x%02x", data[i]);
	}
	print(text, "\"");
}

size_t files_print(const struct files_call *call, char *buffer, size_t size)
{
	struct text text = {buffer, size, 0};

	print(&text, "%s", files_call_names[call->kind]);
	for (int i = 0; i < FILES_MOST_ARGUMENTS; i++) {
		const struct argument *argument = &arguments[call->kind][i];
		int64_t value = call->values[i];

		if (argument->kind == NONE)
			break;
		print(&text, " ");
		switch (argument->kind) {
		case NONE:
			break;
		case SLOT:
			print(&text, "f%d", (int)value);
			break;
		case NAME:
			print(&text, "%s", name_texts[value]);
			break;
		case NUMBER:
		case LENGTH:
		case FILL:
			print(&text, "%lld", (long long)value);
			break;
		case OPEN:
			print_open(&text, call->open);
			break;
		case DATA:
			print_data(&text, call->data, value);
			break;
		case LISTS:
			print(&text, "%s", entries[argument->first + call->index[i]].text);
			break;
		}
	}
	return text.length;
}
