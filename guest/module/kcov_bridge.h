/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Declarations that the files of kcov_bridge.ko share.
 *
 *	main.c		the PCI device: probe, removal, module parameters
 *	transport.c	slots, requests and answers, a host that does not answer
 *	owners.c	tasks that trace, and the work at the end of their system calls
 *	calls.c		the log of an owner's system calls
 *	reach.c		what a system call can have to do with a target
 *	follow.c	children of tasks that trace for the host
 *	hooks.c		the tracepoints that show system calls, forks and exits of owners
 *	device.c	the kcov device's file: open, ioctl, mmap, close
 *	watch.c		a host that records this kernel's own code
 *	wire.c		connections to the target through the region
 *	stats.c		figures for people, in debugfs
 *
 * Locks, outermost first. A lock is never taken while one that is listed below it is held.
 *
 *	mmap_lock (the caller's)	held around mmap and page faults
 *	kb_describe_lock (watch.c)	one description of the kernel at a time
 *	kb_instance.lock		one request at a time in a slot; all of an instance
 *	    (kb_wires_mutex (wire.c) is taken before it: which connections there are; below that
 *	    mutex also read_lock, write_lock of a connection, and kb_wires_lock, a spinlock)
 *	  kb_hook_lock (hooks.c)	whether the tracepoints are hooked
 *	  kb_region_lock (calls.c)	whether the region is mapped as a whole
 *	  kb_bridge.payload_lock	the payload, from filling it to the answer
 *	    i_mmap_rwsem		only to remove mappings
 *	    kb_bridge.slots_lock	which slot belongs to which instance (spinlock)
 *	    kb_owners_lock (owners.c)	the table of owners, and their counts (spinlock; readers of
 *					  the table: RCU)
 *	    kb_bridge.lost_lock		which request the host missed (spinlock)
 *
 * kb_bridge.self is an instance without an owner; its lock is a kb_instance.lock. If both are
 * needed, payload_lock is taken before kb_hook_lock.
 *
 * Barriers, in pairs:
 *
 *	kb_request_send() stores seq last	the host reads seq first
 *	the host stores a response's seq last	kb_slot_is_answered() reads it first
 *	kb_call_write() stores head last	the host reads head first
 *	kick, full barrier, host_state		the host: host_state, full barrier, kick
 *						  (kb_doorbell_kick(), Doorbell in doorbell.py)
 *	kb_task_drop_trace_flag()		kb_trace_flag_share(): flag and exclusiveness
 *	kb_trace_flag_start()			kb_foreign_probe(): exclusiveness and probes
 */
#ifndef KCOV_BRIDGE_H
#define KCOV_BRIDGE_H

#include <linux/bitmap.h>
#include <linux/compiler.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/lockdep.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/task_work.h>
#include <linux/tracepoint.h>
#include <linux/wait.h>
#include <asm/fpu/api.h>
#include <uapi/linux/kcov.h>

#include "kcov_bridge_abi.h"

/* Registers of ivshmem-doorbell in BAR 0: docs/specs/ivshmem-spec.txt in QEMU. */
#define KB_REG_DOORBELL		12

/* Module parameters: how long a request waits for the host, and how much of that it polls. */
extern unsigned int kb_timeout_ms;
extern unsigned int kb_spin_us;

struct kb_bridge;
struct kb_calls;
struct kb_owner;

/**
 * struct kb_instance - one open descriptor, or a task that is followed without one
 * @ref: held by the file (mappings hold the file), each kb_owner made from it, until that is
 *	freed, and each check of a new mapping
 * @lock: held during a whole request: one at a time in a slot
 * @bridge: the device that it was opened on; holds a reference to it
 * @mapping: the file's address space, to find mappings; NULL without a file, and once it is closed.
 *	Guarded by @lock
 * @owner: the owner, or NULL. Guarded by @lock
 * @slot: constant from open to release
 * @detached: the device is gone, and no further request is sent. Guarded by @lock
 * @hidden: the slot's word of that name in the region; @nowhere once the device is gone. Written
 *	under @lock, read without it under RCU
 * @nowhere: gets the writes to @hidden once the device is gone
 * @generation: distinguishes this open from earlier ones in the slot. Written under @lock
 * @seq: number of the last request. Guarded by @lock
 * @answered: whether the host has answered any request of this open. Written under @lock
 * @request: the last request as it was sent, without its seq. Guarded by @lock
 * @unanswered: op of the last request if it timed out, else 0. Guarded by @lock
 * @deferred_exit: an owner that ended while the host was gone, still to be reported, else 0.
 *	Guarded by @lock
 * @deferred_returns: unreported returns of that owner. Guarded by @lock
 * @mappings: vmas that map the area
 * @map_start: page frame of the lowest page that was ever mapped. Guarded by @lock
 * @map_end: page frame after the highest such page, 0 if there was none. Guarded by @lock
 * @timeouts: requests that timed out. Written by the owner
 * @skipped: returns that were not reported. Written by the owner
 * @rcu: frees it
 * @blank_page: the page that mappings show once the device is gone, or 0. Guarded by @lock
 */
struct kb_instance {
	struct kref ref;
	struct mutex lock;
	struct kb_bridge *bridge;
	struct address_space *mapping;
	struct kb_owner *owner;
	unsigned int slot;
	bool detached;
	u64 *hidden;
	u64 nowhere;
	u64 generation;
	u64 seq;
	bool answered;
	struct kb_request request;
	u64 unanswered;
	u64 deferred_exit;
	u64 deferred_returns;
	atomic_t mappings;
	unsigned long map_start;
	unsigned long map_end;
	atomic64_t timeouts;
	atomic64_t skipped;
	struct rcu_head rcu;
	unsigned long blank_page;
};

/* What a system call can have to do with a target. */
enum kb_reach {
	/* It waits for the answer of a target that it reaches. */
	KB_REACH_CALL	= 0,
	/* It touches neither files, sockets nor memory maps. */
	KB_REACH_NONE,
	/* As KB_REACH_NONE, but it waits: what an earlier call left to a target may happen meanwhile. */
	KB_REACH_WAIT,
	/* It may leave work to a target, or find what an earlier call left to it. */
	KB_REACH_LATER,
	/* Only works that the kernel does after its end may reach one. */
	KB_REACH_WORKS,
};

/**
 * struct kb_entry - what an owner's system call found when it began
 * @noted: the call began while calls were told apart; if not, all fields below are void
 * @reach: what it can have to do with a target
 * @since: the coverage position from which on the call gets what was covered
 * @epoch: the header's coverage epoch
 * @switches: how often the task had slept
 * @cycles: the time-stamp counter
 */
struct kb_entry {
	bool noted;
	enum kb_reach reach;
	u64 since;
	u64 epoch;
	unsigned long switches;
	u64 cycles;
};

/**
 * struct kb_owner - a task that traces, from ENABLE to DISABLE or exit
 * @ref: held by kb_instance.owner and by each queued work
 * @rcu: frees it
 * @node: in the table of owners; readers under RCU
 * @inst: holds a reference to it
 * @task: holds a reference to it
 * @id: the host's name for the task: the thread id in the low half, a unique number in the high one
 * @ignores_returns: returns are not reported, because the host does not need them
 * @stream: number of the host's stream that it traces into, or 0
 * @follows_children: whether its children trace into the stream as well
 * @return_work: runs at the end of a system call. Only the task accesses this field and those
 *	below, except that another task which ends the owner at its exit reads @unreported_returns
 * @return_queued: whether @return_work is queued
 * @return_alone: whether @return_work is all that the task does before it returns to user mode
 * @nr: number of the system call that returns
 * @coverage_epoch: the header's coverage epoch before the last return that was reported
 * @empty_epoch: the same for the last return that was reported without coverage
 * @unreported_returns: number of returns since the last one that was reported
 * @untraced_children: number of children that should trace into the stream and cannot
 * @soonest: the shortest time in which a target can answer, in cycles of the time-stamp counter
 * @entry: of the present system call
 * @entries_number: kb_entries_number as of the last system call that was noted
 * @unsettled: a call of KB_REACH_LATER was made since the last one of another kind that was reported
 * @later_since: the coverage position when the last call of KB_REACH_LATER began, or ~0
 * @tells_calls: whether the host wants calls told apart. Constant while it is in the table
 * @exit_work: runs when the task exits
 * @calls: the log of its system calls, or NULL. Constant while it is in the table
 *
 * Only the task itself accesses the works. But another task may find it exiting and end the
 * ownership in its place, so an owner can outlive its place in the instance.
 */
struct kb_owner {
	struct kref ref;
	struct rcu_head rcu;
	struct hlist_node node;
	struct kb_instance *inst;
	struct task_struct *task;
	u64 id;
	bool ignores_returns;
	u64 stream;
	bool follows_children;
	struct callback_head return_work;
	bool return_queued;
	bool return_alone;
	int nr;
	u64 coverage_epoch;
	u64 empty_epoch;
	u64 unreported_returns;
	u64 untraced_children;
	u64 soonest;
	struct kb_entry entry;
	unsigned int entries_number;
	bool unsettled;
	u64 later_since;
	bool tells_calls;
	struct callback_head exit_work;
	struct kb_calls *calls;
};

/**
 * struct kb_bridge - one life of the PCI device, from probe to removal
 * @ref: held by the driver while the device is there, and by each instance
 * @rcu: frees it
 * @registers: BAR 0, unmapped with the device
 * @header: the region up to the areas, unmapped with the device, as the three below
 * @requests: by slot
 * @responses: by slot
 * @region: the whole region, mapped for the first owner with a log, or NULL; see calls.c
 * @payload: guarded by @payload_lock, from filling it to the answer
 * @payload_lock: guards @payload
 * @payload_inst: the instance whose request last filled the payload, only to be compared. Written
 *	under @payload_lock
 * @region_start: physical address of the region
 * @region_bytes: size of the region
 * @host_peer: the host's peer number, for the doorbell
 * @kicked: the last value of kick that the module wrote
 * @device_file: the kcov device in debugfs, or NULL
 * @stats_file: figures in debugfs
 * @host_file: the agent writes here when the host has changed
 * @self: an instance for the module's own requests, with a slot but without a descriptor
 * @wires: whether it offers connections, which need interrupts. Constant after probe
 * @slots_lock: guards the fields from @removed to @zombie_seq
 * @removed: the device is being removed, and no instance is made
 * @slots: slots in use
 * @instances: by slot
 * @zombies: slots whose release the host has not answered; they are not used again before that
 * @zombie_seq: number of that release, by slot
 * @slot_released: woken when an instance has released its slot
 * @lost_lock: guards the four fields below; @lost itself is read without it
 * @lost: the host did not answer in time
 * @lost_slot: the slot of the request that it did not answer
 * @lost_seq: the number of that request
 * @lost_epoch: the host's epoch at that time
 * @timeouts: requests of all instances that timed out
 * @skipped: returns of all instances, and modules, that were not reported
 * @untraced: untraced tasks of streams that could not be reported to the host. Guarded by the lock
 *	of @self
 */
struct kb_bridge {
	struct kref ref;
	struct rcu_head rcu;
	void __iomem *registers;
	struct kb_header *header;
	struct kb_request *requests;
	const struct kb_response *responses;
	void *region;
	u64 *payload;
	struct mutex payload_lock;
	const struct kb_instance *payload_inst;
	phys_addr_t region_start;
	u64 region_bytes;
	u32 host_peer;
	u64 kicked;
	struct dentry *device_file;
	struct dentry *stats_file;
	struct dentry *host_file;
	struct kb_instance self;
	bool wires;

	spinlock_t slots_lock;
	bool removed;
	DECLARE_BITMAP(slots, KB_SLOTS);
	struct kb_instance *instances[KB_SLOTS];
	DECLARE_BITMAP(zombies, KB_SLOTS);
	u64 zombie_seq[KB_SLOTS];
	wait_queue_head_t slot_released;

	spinlock_t lost_lock;
	bool lost;
	unsigned int lost_slot;
	u64 lost_seq;
	u64 lost_epoch;
	atomic64_t timeouts;
	atomic64_t skipped;
	u64 untraced;
};

/*
 * The present device, or NULL. Probe sets it before the files of the device exist, and removal
 * clears it when they are gone, so the operations of these files may use it.
 */
extern struct kb_bridge *kb_active;

void kb_bridge_put(struct kb_bridge *bridge);

/* transport.c */

u64 kb_number_new(void);
void kb_numbers_seed(void);
void kb_instance_init(struct kb_instance *inst, struct kb_bridge *bridge);
int kb_slot_acquire(struct kb_instance *inst);
void kb_slot_release(struct kb_instance *inst);
bool kb_slots_name_generations(struct kb_bridge *bridge);
bool kb_host_is_gone_slow(struct kb_bridge *bridge, u64 epoch);
bool kb_instance_settle(struct kb_instance *inst);
void kb_instance_defer_exit(struct kb_instance *inst, u64 task, u64 returns);
int kb_request(struct kb_instance *inst, enum kb_op op, u64 task, u64 arg0, u64 arg1, u64 arg2);

static inline bool kb_slot_is_answered(const struct kb_bridge *bridge, unsigned int slot, u64 seq)
{
	/* Pairs with the host's store of seq, the last of a response. */
	return smp_load_acquire(&bridge->responses[slot].seq) == seq;
}

/* Return whether a request would get no answer. This ends by itself when the host is back. */
static inline bool kb_host_is_gone(struct kb_bridge *bridge)
{
	u64 epoch = READ_ONCE(bridge->header->host_epoch);

	if (likely(epoch && !READ_ONCE(bridge->lost)))
		return false;
	return kb_host_is_gone_slow(bridge, epoch);
}

/* Count a report that the host did not get. Must not be called once the device is gone. */
static inline void kb_skipped_count(struct kb_bridge *bridge)
{
	WRITE_ONCE(bridge->header->guest_skipped, atomic64_inc_return(&bridge->skipped));
}

/* owners.c */

extern bool kb_entries_noted;
extern bool kb_entries_used;

struct kb_owner *kb_owner_of(struct task_struct *task);
u64 kb_current_id(void);
void kb_owner_call_begin(struct kb_owner *owner, struct pt_regs *regs, long number);
int kb_owner_start(struct kb_instance *inst, enum kb_op op, u64 arg0, u64 arg1, u64 arg2);
void kb_owner_end(struct kb_instance *inst);
void kb_owner_end_exiting(struct kb_instance *inst);
void kb_instance_lock(struct kb_instance *inst);
void kb_sys_exit(void *unused, struct pt_regs *regs, long ret);
void kb_process_exit(void *unused, struct task_struct *task);

/* calls.c */

void kb_sys_enter(void *unused, struct pt_regs *regs, long id);
void kb_call_returns(struct kb_owner *owner, struct pt_regs *regs, long result);
bool kb_calls_are_many(const struct kb_owner *owner);
void kb_calls_end(struct kb_owner *owner);
void kb_calls_free(struct kb_owner *owner);
int kb_calls_start(struct kb_owner *owner, u64 offset, bool joining);
void kb_calls_stop(struct kb_bridge *bridge);

/* reach.c */

enum kb_reach kb_call_reach(struct pt_regs *regs, long number);

/* follow.c */

void kb_process_fork(void *unused, struct task_struct *parent, struct task_struct *child);
void kb_untraced_report(struct kb_bridge *bridge, u64 stream, u64 tasks);

/* hooks.c */

extern int (*kb_task_work_add)(struct task_struct *task, struct callback_head *work,
			       enum task_work_notify_mode notify);
extern bool kb_trace_flag_exclusive;

int kb_hooks_find(void);
int kb_hooks_install(void);
int kb_hooks_install_enter(void);
void kb_hooks_remove(void);

/*
 * Clear current's trace flag if only this module needs it. A probe on a tracepoint of system calls
 * sets a flag in every task, which its children inherit, and which makes its system calls slow. If
 * the module's probe is the only one, a task that owns nothing loses the flag at its first system
 * call, and an owner has it from kb_owner_start() on.
 */
static inline void kb_task_drop_trace_flag(void)
{
	if (!READ_ONCE(kb_trace_flag_exclusive))
		return;
	clear_syscall_work(SYSCALL_TRACEPOINT);
	/* Pairs with kb_trace_flag_share(): we see its write, or it sets the flag after us. */
	smp_mb__after_atomic();
	if (!READ_ONCE(kb_trace_flag_exclusive))
		set_syscall_work(SYSCALL_TRACEPOINT);
}

/* device.c */

extern const struct file_operations kb_device_fops;

struct kb_instance *kb_instance_new(struct kb_bridge *bridge, struct address_space *mapping);
void kb_instance_free(struct kref *ref);
unsigned int kb_instances_detach(struct kb_bridge *bridge);

/* wire.c */

int kb_wires_start(struct kb_bridge *bridge, struct pci_dev *pdev);
void kb_wires_stop(void);

/* stats.c */

extern const struct file_operations kb_stats_fops;

/* watch.c */

extern const struct file_operations kb_host_fops;
extern bool kb_kernel_watched;

int kb_watch_start(struct kb_bridge *bridge);
void kb_watch_stop(struct kb_bridge *bridge);
void kb_owner_await_recording(struct kb_instance *inst);

static inline void kb_instance_set_hidden(const struct kb_instance *inst, enum kb_hidden hidden)
{
	/* Removal waits for this section before it unmaps the region. */
	rcu_read_lock();
	WRITE_ONCE(*READ_ONCE(inst->hidden), hidden);
	rcu_read_unlock();
}

/*
 * Pause recording until kb_recording_resume(), because the owner runs the module's code. Only the
 * task itself calls this.
 */
static inline void kb_recording_pause(const struct kb_instance *inst)
{
	if (!READ_ONCE(kb_kernel_watched))
		return;
	kb_instance_set_hidden(inst, KB_HIDDEN_YES);
	barrier();
}

static inline void kb_recording_resume(const struct kb_instance *inst)
{
	if (!READ_ONCE(kb_kernel_watched))
		return;
	barrier();
	kb_instance_set_hidden(inst, KB_HIDDEN_NO);
}

/*
 * Return whether current has work to do before it returns to user mode that it would also have
 * without the module: task works of others, a signal, a stop for its tracer.
 */
static inline bool kb_exit_work_is_due(void)
{
	return READ_ONCE(current->task_works) || test_thread_flag(TIF_NOTIFY_RESUME) ||
	       signal_pending(current) || current->ptrace;
}

/*
 * Return whether all exit work would be the module's if the module queued a task work for the
 * owner. There may be some already because the module slept in the owner's system call.
 */
static inline bool kb_exit_work_is_own(const struct kb_instance *inst)
{
	if (READ_ONCE(*READ_ONCE(inst->hidden)) == KB_HIDDEN_EXIT_LATER)
		return !signal_pending(current) && !current->ptrace;
	return !kb_exit_work_is_due();
}

/*
 * Load the floating-point registers here, which a task that slept otherwise does at the exit. A
 * thread of the kernel, which writes to a wire for the 9p client, has none and no such exit.
 */
static inline void kb_fpu_load(void)
{
#ifdef KB_SWITCH_FPU_EXPORTED
	if (current->flags & (PF_KTHREAD | PF_IO_WORKER))
		return;
	local_irq_disable();
	if (test_thread_flag(TIF_NEED_FPU_LOAD))
		switch_fpu_return();
	local_irq_enable();
#endif
}

/*
 * Do kb_recording_resume() for an owner that is about to return to user mode. With @caused the exit
 * work is the module's too, because the module queued a task work or slept.
 */
static inline void kb_recording_resume_at_exit(const struct kb_instance *inst, bool caused)
{
	if (!READ_ONCE(kb_kernel_watched))
		return;
	kb_fpu_load();
	barrier();
	kb_instance_set_hidden(inst, caused ? KB_HIDDEN_EXIT : KB_HIDDEN_NO);
}

/* Do kb_recording_pause() if current is an owner. */
static inline void kb_recording_pause_current(void)
{
	struct kb_owner *owner;

	if (!READ_ONCE(kb_kernel_watched))
		return;
	rcu_read_lock();
	owner = kb_owner_of(current);
	if (owner)
		kb_recording_pause(owner->inst);
	rcu_read_unlock();
}

static inline void kb_hidden_set_current(enum kb_hidden hidden)
{
	struct kb_owner *owner;

	rcu_read_lock();
	owner = kb_owner_of(current);
	if (owner)
		kb_instance_set_hidden(owner->inst, hidden);
	rcu_read_unlock();
}

/* Do kb_recording_resume() if current is an owner. */
static inline void kb_recording_resume_current(void)
{
	if (READ_ONCE(kb_kernel_watched))
		kb_hidden_set_current(KB_HIDDEN_NO);
}

/*
 * Do kb_recording_resume_current() at the end of an operation, after which the system call
 * continues. @due is kb_exit_work_is_due() before the operation. Exit work that has come since then
 * means that the module has slept.
 */
static inline void kb_recording_resume_operation(bool due)
{
	if (!READ_ONCE(kb_kernel_watched))
		return;
	kb_fpu_load();
	kb_hidden_set_current(!due && test_thread_flag(TIF_NOTIFY_RESUME) ? KB_HIDDEN_EXIT_LATER :
									    KB_HIDDEN_NO);
}

#endif /* KCOV_BRIDGE_H */
