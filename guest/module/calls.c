// SPDX-License-Identifier: GPL-2.0
/*
 * The log of an owner's system calls, which the host asks for when the owner joins a stream.
 *
 * The probe on sys_enter notes number, arguments, time, and the strings that are paths, in the log's
 * record of the present call. The probe on sys_exit adds result and time, and writes the record into
 * the log's ring. The host empties the ring when the owner asks for that (KB_OP_CALLS), and when the
 * owner ends or the stream does; then it also takes the present call. So a call costs no request of
 * its own.
 *
 * sys_enter is hooked when the first owner with a log starts, or the second owner of any kind.
 */

#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <asm/syscall.h>
#include <asm/unistd.h>

#include "kcov_bridge.h"

#define KB_CALL_WORDS		(sizeof(struct kb_call) / sizeof(u64))
/* A larger bitmap would take too long to clear at each call. */
#define KB_BITMAP_MOST_WORDS	(1 << 16)
#define KB_STRING_WORDS		(KB_CALL_STRING_BYTES / sizeof(u64))

/* The strings of a call. */
struct kb_call_string {
	unsigned int argument;
	/* Length without NUL, 0 for none; cut if it is KB_CALL_STRING_BYTES. */
	long length;
	union {
		char text[KB_CALL_STRING_BYTES];
		u64 words[KB_STRING_WORDS];
	};
};

/**
 * struct kb_calls - the log of one owner
 * @rcu: frees it
 * @log: in the region
 * @count: count of the owner's area, in the region
 * @bitmap: bitmap of that area, to be cleared at each call, or NULL
 * @bitmap_words: size of @bitmap
 * @mask: size of the ring in words, minus one
 * @head: the log's head
 * @lost: the log's lost
 * @skips_exit: the next exit is of the call by which the owner joined the stream
 * @entered: @call and @strings are of a call that was entered and has not returned
 * @flags: enum kb_call_flags of @call, except for the strings
 * @call: the record, without its strings
 * @strings: of the call
 * @n_strings: number of these
 *
 * Only the owner accesses it, within an RCU read-side section, until it is exiting. Then the task
 * that ends the ownership does, under the lock of the instance.
 */
struct kb_calls {
	struct rcu_head rcu;
	struct kb_call_log *log;
	const u64 *count;
	u64 *bitmap;
	u64 bitmap_words;
	u64 mask;
	u64 head;
	u64 lost;
	bool skips_exit;
	bool entered;
	u64 flags;
	struct kb_call call;
	struct kb_call_string strings[KB_CALL_STRINGS];
	unsigned int n_strings;
};

/* Guards kb_bridge.region while it is mapped. Taken under the lock of an instance. */
static DEFINE_MUTEX(kb_region_lock);

/* The arguments of system calls that are paths or names: bit n for argument n. */
static const u8 kb_string_arguments[] = {
	[__NR_open]		= 1,
	[__NR_stat]		= 1,
	[__NR_lstat]		= 1,
	[__NR_access]		= 1,
	[__NR_execve]		= 1,
	[__NR_truncate]		= 1,
	[__NR_chdir]		= 1,
	[__NR_rename]		= 1 | 2,
	[__NR_mkdir]		= 1,
	[__NR_rmdir]		= 1,
	[__NR_creat]		= 1,
	[__NR_link]		= 1 | 2,
	[__NR_unlink]		= 1,
	[__NR_symlink]		= 1 | 2,
	[__NR_readlink]		= 1,
	[__NR_chmod]		= 1,
	[__NR_chown]		= 1,
	[__NR_lchown]		= 1,
	[__NR_utime]		= 1,
	[__NR_mknod]		= 1,
	[__NR_statfs]		= 1,
	[__NR_pivot_root]	= 1 | 2,
	[__NR_chroot]		= 1,
	[__NR_acct]		= 1,
	[__NR_mount]		= 1 | 2 | 4,
	[__NR_umount2]		= 1,
	[__NR_swapon]		= 1,
	[__NR_swapoff]		= 1,
	[__NR_delete_module]	= 1,
	[__NR_setxattr]		= 1 | 2,
	[__NR_lsetxattr]	= 1 | 2,
	[__NR_fsetxattr]	= 2,
	[__NR_getxattr]		= 1 | 2,
	[__NR_lgetxattr]	= 1 | 2,
	[__NR_fgetxattr]	= 2,
	[__NR_listxattr]	= 1,
	[__NR_llistxattr]	= 1,
	[__NR_removexattr]	= 1 | 2,
	[__NR_lremovexattr]	= 1 | 2,
	[__NR_fremovexattr]	= 2,
	[__NR_utimes]		= 1,
	[__NR_inotify_add_watch] = 2,
	[__NR_openat]		= 2,
	[__NR_mkdirat]		= 2,
	[__NR_mknodat]		= 2,
	[__NR_fchownat]		= 2,
	[__NR_futimesat]	= 2,
	[__NR_newfstatat]	= 2,
	[__NR_unlinkat]		= 2,
	[__NR_renameat]		= 2 | 8,
	[__NR_linkat]		= 2 | 8,
	[__NR_symlinkat]	= 1 | 4,
	[__NR_readlinkat]	= 2,
	[__NR_fchmodat]		= 2,
	[__NR_faccessat]	= 2,
	[__NR_utimensat]	= 2,
	[__NR_name_to_handle_at] = 2,
	[__NR_renameat2]	= 2 | 8,
	[__NR_memfd_create]	= 1,
	[__NR_execveat]		= 2,
	[__NR_statx]		= 2,
	[__NR_open_tree]	= 2,
	[__NR_move_mount]	= 2 | 8,
	[__NR_fsopen]		= 1,
	[__NR_fspick]		= 2,
#ifdef __NR_openat2
	[__NR_openat2]		= 2,
#endif
#ifdef __NR_faccessat2
	[__NR_faccessat2]	= 2,
#endif
#ifdef __NR_mount_setattr
	[__NR_mount_setattr]	= 2,
#endif
#ifdef __NR_fchmodat2
	[__NR_fchmodat2]	= 2,
#endif
};

/* ---- a call -------------------------------------------------------------------------------- */

/* Copy the strings that are still missing, as far as their pages are there. */
static void kb_call_copy_strings(struct kb_calls *calls)
{
	unsigned int i;

	for (i = 0; i < calls->n_strings; i++) {
		struct kb_call_string *string = &calls->strings[i];
		const char __user *user = (void __user *)calls->call.arguments[string->argument];

		if (string->length >= 0)
			continue;
		/* So a page that is not there is an error; this code must not sleep. */
		pagefault_disable();
		string->length = strncpy_from_user(string->text, user, KB_CALL_STRING_BYTES);
		pagefault_enable();
	}
}

static void kb_call_note(struct kb_calls *calls, struct pt_regs *regs, long number)
{
	struct kb_call *call = &calls->call;
	unsigned long arguments[6];
	u8 strings = 0;
	unsigned int i;

	calls->flags = 0;
	call->number = number;
	call->result = 0;
	call->returned = 0;
	call->count = READ_ONCE(*calls->count);
	syscall_get_arguments(current, regs, arguments);
	for (i = 0; i < 6; i++)
		call->arguments[i] = arguments[i];
	BUILD_BUG_ON(sizeof(call->command) != TASK_COMM_LEN);
	memcpy(call->command, current->comm, TASK_COMM_LEN);
	calls->n_strings = 0;
	if (in_ia32_syscall())
		calls->flags |= KB_CALL_IA32;
	else if (number >= 0 && number < ARRAY_SIZE(kb_string_arguments))
		strings = kb_string_arguments[number];
	for (i = 0; strings && calls->n_strings < KB_CALL_STRINGS; i++, strings >>= 1) {
		if (!(strings & 1))
			continue;
		calls->strings[calls->n_strings].argument = i;
		calls->strings[calls->n_strings++].length = -EFAULT;
	}
	if (calls->n_strings)
		kb_call_copy_strings(calls);
}

/* Return the words that a string takes in the record, with its NUL. */
static unsigned int kb_call_string_words(struct kb_call_string *string)
{
	if (string->length < 0)
		return 0;
	if (string->length >= KB_CALL_STRING_BYTES)
		string->text[KB_CALL_STRING_BYTES - 1] = '\0';
	return min_t(unsigned int, string->length / sizeof(u64) + 1, KB_STRING_WORDS);
}

/* Compute the record's first word; return the record's length. */
static unsigned int kb_call_measure(struct kb_calls *calls)
{
	unsigned int words = KB_CALL_WORDS;
	u64 flags = calls->flags;
	unsigned int i;

	for (i = 0; i < calls->n_strings; i++) {
		struct kb_call_string *string = &calls->strings[i];
		unsigned int n = kb_call_string_words(string);

		words += n;
		if (n)
			flags |= 1ULL << string->argument;
		if (n && string->length >= KB_CALL_STRING_BYTES)
			flags |= 1ULL << (string->argument + KB_CALL_CUT_SHIFT);
	}
	calls->call.words = words | flags << KB_CALL_WORDS_BITS;
	return words;
}

static void kb_words_put(u64 *to, const u64 *words, unsigned int n)
{
	unsigned int i;

	for (i = 0; i < n; i++)
		WRITE_ONCE(to[i], words[i]);
}

/* Show the host the call in which the owner is. */
static void kb_call_show(struct kb_calls *calls)
{
	u64 *to = calls->log->call;
	unsigned int i;

	BUILD_BUG_ON(KB_CALL_WORDS + KB_CALL_STRINGS * KB_STRING_WORDS > KB_CALL_MOST_WORDS);
	kb_call_measure(calls);
	kb_words_put(to, (const u64 *)&calls->call, KB_CALL_WORDS);
	to += KB_CALL_WORDS;
	for (i = 0; i < calls->n_strings; i++) {
		unsigned int n = kb_call_string_words(&calls->strings[i]);

		kb_words_put(to, calls->strings[i].words, n);
		to += n;
	}
	smp_store_release(&calls->log->entered, 1);
}

static void kb_log_put(struct kb_calls *calls, const u64 *words, unsigned int n)
{
	unsigned int i;

	for (i = 0; i < n; i++)
		WRITE_ONCE(calls->log->ring[calls->head++ & calls->mask], words[i]);
}

/* Return how many words of the ring the host has not taken. */
static u64 kb_log_used(const struct kb_calls *calls)
{
	/* A wrong value means a full ring, or that records are overwritten, which the host sees. */
	return calls->head - READ_ONCE(calls->log->tail);
}

/* Write the record of the present call into the log. */
static void kb_call_write(struct kb_calls *calls)
{
	unsigned int words = kb_call_measure(calls);
	u64 used = kb_log_used(calls);
	unsigned int i;

	WRITE_ONCE(calls->log->entered, 0);
	if (used > calls->mask + 1 || words > calls->mask + 1 - used) {
		WRITE_ONCE(calls->log->lost, ++calls->lost);
		return;
	}
	kb_log_put(calls, (const u64 *)&calls->call, KB_CALL_WORDS);
	for (i = 0; i < calls->n_strings; i++)
		kb_log_put(calls, calls->strings[i].words,
			   kb_call_string_words(&calls->strings[i]));
	/* The host reads head first. */
	smp_store_release(&calls->log->head, calls->head);
}

/* ---- the probes ---------------------------------------------------------------------------- */

/**
 * kb_sys_enter() - handle the tracepoint sys_enter
 * @unused: not used
 * @regs: of the system call
 * @id: its number
 */
void kb_sys_enter(void *unused, struct pt_regs *regs, long id)
{
	struct kb_owner *owner;

	if (!READ_ONCE(kb_entries_used))
		return;
	rcu_read_lock();
	owner = kb_owner_of(current);
	if (owner && owner->tells_calls && READ_ONCE(kb_entries_noted)) {
		kb_recording_pause(owner->inst);
		kb_owner_call_begin(owner, regs, id);
		kb_recording_resume(owner->inst);
	}
	if (owner && owner->calls) {
		struct kb_calls *calls = owner->calls;

		kb_recording_pause(owner->inst);
		kb_call_note(calls, regs, id);
		if (calls->bitmap)
			memset(calls->bitmap, 0, calls->bitmap_words * sizeof(u64));
		calls->entered = true;
		calls->skips_exit = false;
		calls->call.entered = ktime_get_ns();
		kb_call_show(calls);
		kb_recording_resume(owner->inst);
	}
	rcu_read_unlock();
}

/**
 * kb_call_returns() - log the end of an owner's system call
 * @owner: the owner, which has a log; it runs this
 * @regs: of the system call
 * @result: its result
 */
void kb_call_returns(struct kb_owner *owner, struct pt_regs *regs, long result)
{
	u64 hidden = READ_ONCE(*READ_ONCE(owner->inst->hidden));
	struct kb_calls *calls = owner->calls;
	u64 now;

	if (calls->skips_exit) {
		calls->skips_exit = false;
		return;
	}
	kb_recording_pause(owner->inst);
	now = ktime_get_ns();
	if (!calls->entered) {
		/* Refused by seccomp, which comes before sys_enter. */
		kb_call_note(calls, regs, syscall_get_nr(current, regs));
		calls->flags |= KB_CALL_REFUSED;
		calls->call.entered = now;
	} else if (calls->n_strings) {
		/* The call itself has read them by now. */
		kb_call_copy_strings(calls);
	}
	calls->entered = false;
	calls->call.returned = now;
	calls->call.result = result;
	calls->flags |= KB_CALL_RETURNED;
	kb_call_write(calls);
	if (READ_ONCE(kb_kernel_watched))
		kb_instance_set_hidden(owner->inst, hidden);
}

/**
 * kb_calls_are_many() - return whether the host should empty an owner's log
 * @owner: the owner, which has a log
 */
bool kb_calls_are_many(const struct kb_owner *owner)
{
	return kb_log_used(owner->calls) > owner->calls->mask / 2;
}

/* ---- the life of a log --------------------------------------------------------------------- */

/**
 * kb_calls_end() - log the call in which an owner ends
 * @owner: the owner, which has a log and is exiting
 */
void kb_calls_end(struct kb_owner *owner)
{
	struct kb_calls *calls = owner->calls;

	lockdep_assert_held(&owner->inst->lock);
	if (!calls->entered)
		return;
	calls->entered = false;
	kb_call_write(calls);
}

/**
 * kb_calls_free() - free the log of an owner that ends
 * @owner: the owner
 */
void kb_calls_free(struct kb_owner *owner)
{
	if (owner->calls)
		kfree_rcu(owner->calls, rcu);
}

/* Return whether a range of the region lies in its areas, at a word. */
static bool kb_region_holds(const struct kb_bridge *bridge, u64 offset, u64 words)
{
	return offset >= KB_AREAS_OFFSET && offset % sizeof(u64) == 0 &&
	       offset <= bridge->region_bytes &&
	       words <= (bridge->region_bytes - offset) / sizeof(u64);
}

/* Map the whole region, until kb_calls_stop(). */
static void *kb_region_map(struct kb_bridge *bridge)
{
	mutex_lock(&kb_region_lock);
	if (!bridge->region)
		bridge->region = memremap(bridge->region_start, bridge->region_bytes, MEMREMAP_WB);
	mutex_unlock(&kb_region_lock);
	return bridge->region;
}

/**
 * kb_calls_start() - give an owner the log that the host has made for it
 * @owner: the owner, which is current, and starts
 * @offset: of the log, in the region
 * @joining: whether the owner joins the stream by a system call of its own
 *
 * Return: 0 or a negative errno.
 */
int kb_calls_start(struct kb_owner *owner, u64 offset, bool joining)
{
	struct kb_bridge *bridge = owner->inst->bridge;
	struct kb_call_log *log;
	struct kb_calls *calls;
	u64 words, count, bitmap;
	void *region;
	int err;

	lockdep_assert_held(&owner->inst->lock);
	err = kb_hooks_install_enter();
	if (err)
		return err;
	region = kb_region_map(bridge);
	if (!region)
		return -ENOMEM;
	if (!kb_region_holds(bridge, offset, sizeof(*log) / sizeof(u64)))
		return -EIO;
	log = region + offset;
	words = READ_ONCE(log->ring_words);
	count = READ_ONCE(log->count_offset);
	bitmap = READ_ONCE(log->bitmap_offset);
	if (!is_power_of_2(words) || words > bridge->region_bytes ||
	    !kb_region_holds(bridge, offset, sizeof(*log) / sizeof(u64) + words) ||
	    !kb_region_holds(bridge, count, 1))
		return -EIO;
	calls = kzalloc(sizeof(*calls), GFP_KERNEL);
	if (!calls)
		return -ENOMEM;
	calls->log = log;
	calls->mask = words - 1;
	calls->count = region + count;
	calls->bitmap_words = READ_ONCE(log->bitmap_words);
	/* The bitmap lies before the count. What a program scribbled over the log agrees with nothing. */
	if (calls->bitmap_words && calls->bitmap_words <= KB_BITMAP_MOST_WORDS &&
	    bitmap + calls->bitmap_words * sizeof(u64) == count &&
	    kb_region_holds(bridge, bitmap, calls->bitmap_words))
		calls->bitmap = region + bitmap;
	calls->head = READ_ONCE(log->head);
	calls->lost = READ_ONCE(log->lost);
	calls->skips_exit = joining;
	owner->calls = calls;
	return 0;
}

/**
 * kb_calls_stop() - unmap the region
 * @bridge: the device, whose instances are detached
 */
void kb_calls_stop(struct kb_bridge *bridge)
{
	if (bridge->region)
		memunmap(bridge->region);
	bridge->region = NULL;
}
