// SPDX-License-Identifier: GPL-2.0
/*
 * kcov_bridge: the kcov device on a kernel that was built without it.
 *
 * The host decides, this module forwards. Each open of the device is an instance with a slot in
 * the shared region (see kcov_bridge_abi.h); in the order of its life:
 *
 *   open			takes a slot; the host learns of it with the first request
 *   ioctl(KCOV_INIT_TRACE)	forwarded; the host makes the area
 *   mmap			forwarded; the host says where in the region the area lies
 *   ioctl(KCOV_ENABLE), ioctl(KCOV_UNIQUE_ENABLE), ioctl(KCOV_REMOTE_ENABLE)
 *				forwarded; on success the calling thread becomes the owner
 *   every system call of the owner
 *				at its end, just before user mode, if the host may have covered
 *				something since the last one: forwarded; the host appends PCs
 *   ioctl(KCOV_RESET_TRACE)	forwarded; the area is empty
 *   ioctl(KCOV_DISABLE), exit	forwarded; the owner is none any more
 *   close of the last descriptor	forwarded; the host says whether the owner traces on
 *   close, munmap, exit	the last reference gone: forwarded; the slot is free again
 *
 * What the module keeps is which task owns which instance. Other tasks' system calls cost them
 * nothing but the first after the tracepoint is hooked: see kb_let_go().
 *
 * The end of a system call is seen by the sys_exit tracepoint, where one may not sleep; it queues
 * a task work, which runs in process context before the task goes back to user mode, sends the
 * request and waits for the answer: busy for a moment, then asleep, kb_timeout_ms at most. Where
 * the header's news is what it was, there is nothing to fetch, and none of that happens. A host
 * that does not answer in time is taken for gone, and nobody waits for it again until it
 * shows itself by an answer or a new epoch.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/hashtable.h>
#include <linux/io.h>
#include <linux/kprobes.h>
#include <linux/kref.h>
#include <linux/ktime.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/random.h>
#include <linux/reboot.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/task_work.h>
#include <linux/tracepoint.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/workqueue.h>
#include <asm/desc.h>
#include <asm/msr.h>
#include <asm/smp.h>
#include <asm/syscall.h>
#include <asm/tsc.h>
#include <uapi/linux/kcov.h>

#include "kcov_bridge_abi.h"

static unsigned int kb_timeout_ms = 1000;
module_param_named(timeout_ms, kb_timeout_ms, uint, 0644);
MODULE_PARM_DESC(timeout_ms, "How long a system call return waits for the host (ms)");

static unsigned int kb_spin_us = 100;
module_param_named(spin_us, kb_spin_us, uint, 0644);
MODULE_PARM_DESC(spin_us, "How much of that it waits busily (us)");

/* Registers of ivshmem-doorbell in BAR 0: docs/specs/ivshmem-spec.txt in QEMU. */
#define KB_BAR_REGISTERS	0
#define KB_BAR_REGION		2
#define KB_REG_DOORBELL		12

#define KB_HASH_BITS		8
#define KB_KICK_TRIES		64
#define KB_SLEEP_MIN_US		20
#define KB_SLEEP_MAX_US		1000

struct kb_owner;

/*
 * One open descriptor. References: the file (mappings hold the file) and each kb_owner made from
 * it, until that is freed.
 */
struct kb_instance {
	struct kref ref;
	/* Held over a whole request: one at a time in a slot. Taken inside mmap_lock. */
	struct mutex lock;
	/* Who traces through this instance, or NULL. Guarded by lock. */
	struct kb_owner *owner;
	/* The slot, fixed from open to release. */
	unsigned int slot;
	/* Tells this open from the slot's earlier ones. Guarded by lock. */
	u64 generation;
	/* Number of the last request. Guarded by lock. */
	u64 seq;
	/* Whether the host has answered any request of this open. Written under lock. */
	bool answered;
	/* The last request as it was sent, without its seq. Guarded by lock. */
	struct kb_request request;
	/* Its op if it was given up unanswered, else 0. Guarded by lock. */
	u64 unanswered;
	/* An owner that exited while the host was gone, to be told, else 0. Guarded by lock. */
	u64 exit_owed;
	/* Its returns that the host was not told of. Guarded by lock. */
	u64 exit_untold;
	/* vmas that map the area. */
	atomic_t mappings;
	/* Signals given up, and returns not signalled. Written by the owner. */
	atomic64_t timeouts;
	atomic64_t skipped;
};

/*
 * A task that traces, from ENABLE to DISABLE or exit. References: kb_instance.owner and each
 * queued work. Only the task itself looks at the works, but another task may find it exiting and
 * end the ownership in its place, so an owner can outlive its place in the instance.
 */
struct kb_owner {
	struct kref ref;
	struct rcu_head rcu;
	/* In kb_owners, guarded by kb_owners_lock, readers under RCU. */
	struct hlist_node node;
	struct kb_instance *inst;
	struct task_struct *task;
	/* How the host knows the task: thread id below, a number never used before above. */
	u64 id;
	/* Its calls are not signalled: the host has no use for that. */
	bool silent;
	/* The six below belong to the task alone; who ends it when it is exiting reads untold. */
	struct callback_head return_work;
	bool return_queued;
	int nr;
	/* The header's news before the last return that was told of. */
	u64 seen;
	/* How many returns there were since that the host was not told of. */
	u64 untold;
	struct callback_head exit_work;
};

struct kb_bridge {
	struct pci_dev *pdev;
	void __iomem *registers;
	/* The region up to the areas. */
	struct kb_header *header;
	struct kb_request *requests;
	const struct kb_response *responses;
	/* Guarded by payload_lock, from filling it to the answer. */
	u64 *payload;
	/* Guards payload. Taken inside kb_instance.lock. */
	struct mutex payload_lock;
	phys_addr_t region_start;
	u64 region_bytes;
	u32 host_peer;
	/* What kick was when it was last moved. */
	u64 kicked;
	struct dentry *file;
	struct dentry *stats;
	struct dentry *host;

	/* Guards slots, instances, zombies, zombie_seq. */
	spinlock_t slots_lock;
	DECLARE_BITMAP(slots, KB_SLOTS);
	struct kb_instance *instances[KB_SLOTS];
	/* Slots whose release the host has not answered: not to be reused before. */
	DECLARE_BITMAP(zombies, KB_SLOTS);
	u64 zombie_seq[KB_SLOTS];

	/* Guards lost_*; lost itself is read without. */
	spinlock_t lost_lock;
	bool lost;
	unsigned int lost_slot;
	u64 lost_seq;
	u64 lost_epoch;
	atomic64_t timeouts;
	atomic64_t skipped;
};

/* There is one region in a guest; set by probe before the device files exist. */
static struct kb_bridge *kb;

/* What is asked in the module's own name; it has a slot, and is no instance. */
static struct kb_instance kb_self;
/* Whether the host watches this kernel's code. Set by probe. */
static bool kb_watched;

static DEFINE_HASHTABLE(kb_owners, KB_HASH_BITS);
static DEFINE_SPINLOCK(kb_owners_lock);

/* Starts at random, so that a reloaded module or a rebooted guest repeats no number. */
static atomic64_t kb_next = ATOMIC64_INIT(0);
static atomic_t kb_next_owner = ATOMIC_INIT(0);

/* Guards kb_hooked. */
static DEFINE_MUTEX(kb_hook_lock);
static bool kb_hooked;
static struct tracepoint *kb_tp_sys_enter;
static struct tracepoint *kb_tp_sys_exit;
static struct tracepoint *kb_tp_process_exit;
/* Whether the tracepoints of system calls are ours alone; see kb_let_go(). */
static bool kb_alone;

static int (*kb_task_work_add)(struct task_struct *task, struct callback_head *work,
			       enum task_work_notify_mode notify);

static void kb_instance_free(struct kref *ref);

/* ---- the host ------------------------------------------------------------------------------ */

static bool kb_answered(unsigned int slot, u64 seq)
{
	/* Pairs with the host's last store of a response, that of its seq. */
	return smp_load_acquire(&kb->responses[slot].seq) == seq;
}

/* Whether there is no point in asking. Ends by itself once the host shows signs of life. */
static bool kb_host_gone(void)
{
	u64 epoch = READ_ONCE(kb->header->host_epoch);
	bool gone;

	if (!epoch)
		return true;
	if (likely(!READ_ONCE(kb->lost)))
		return false;
	spin_lock(&kb->lost_lock);
	if (kb->lost && (epoch != kb->lost_epoch || kb_answered(kb->lost_slot, kb->lost_seq))) {
		WRITE_ONCE(kb->lost, false);
		pr_info("the host is back\n");
	}
	gone = kb->lost;
	spin_unlock(&kb->lost_lock);
	return gone;
}

static void kb_host_lost(unsigned int slot, u64 seq)
{
	/* Before the host can learn of it: it answers a time-out with a new epoch. */
	u64 epoch = READ_ONCE(kb->header->host_epoch);
	bool first;

	WRITE_ONCE(kb->header->guest_timeouts, atomic64_inc_return(&kb->timeouts));
	spin_lock(&kb->lost_lock);
	first = !kb->lost;
	kb->lost_slot = slot;
	kb->lost_seq = seq;
	kb->lost_epoch = epoch;
	WRITE_ONCE(kb->lost, true);
	spin_unlock(&kb->lost_lock);
	if (first)
		pr_info_ratelimited("no answer from the host in %u ms; going on without it\n",
				    kb_timeout_ms);
}

static void kb_kick(unsigned int slot)
{
	/* A guess: to read it first would fetch the cache line from the host once more. */
	u64 old = READ_ONCE(kb->kicked);
	int tries;

	for (tries = 0; tries < KB_KICK_TRIES; tries++) {
		u64 next = (((old >> KB_KICK_SLOT_BITS) + 1) << KB_KICK_SLOT_BITS) | slot;
		u64 seen = cmpxchg(&kb->header->kick, old, next);

		if (seen == old) {
			WRITE_ONCE(kb->kicked, next);
			break;
		}
		old = seen;
	}
	/*
	 * cmpxchg() is a full barrier between kick and host_state; it pairs with the one in the
	 * host's Doorbell._doze(), which writes host_state and then reads kick.
	 */
	if (tries == KB_KICK_TRIES || READ_ONCE(kb->header->host_state) != KB_HOST_AWAKE)
		iowrite32(kb->host_peer << 16, kb->registers + KB_REG_DOORBELL);
}

/* Waits for the answer to the request @seq in @slot: true if it came. May sleep. */
static bool kb_wait(unsigned int slot, u64 seq)
{
	u64 spin = (u64)READ_ONCE(kb_spin_us) * tsc_khz / 1000;
	unsigned int sleep_us = KB_SLEEP_MIN_US;
	u64 start = get_cycles();
	ktime_t end;

	/*
	 * The time-stamp counter, because reading the clock may leave the guest. A task that
	 * moves to a processor with another counter only waits busily for less or for longer;
	 * the loop below is bounded by the clock.
	 */
	do {
		if (kb_answered(slot, seq))
			return true;
		cpu_relax();
	} while (get_cycles() - start < spin && !need_resched());

	end = ktime_add_ms(ktime_get(), READ_ONCE(kb_timeout_ms));
	while (!kb_answered(slot, seq)) {
		if (ktime_after(ktime_get(), end))
			return kb_answered(slot, seq);
		usleep_range(sleep_us, sleep_us * 2);
		sleep_us = min_t(unsigned int, sleep_us * 2, KB_SLEEP_MAX_US);
	}
	return true;
}

/* Writes a request into @slot and tells the host. Sent again with its old @seq, it is one still. */
static void kb_send(unsigned int slot, u64 seq, const struct kb_request *from)
{
	struct kb_request *request = &kb->requests[slot];

	WRITE_ONCE(request->op, from->op);
	WRITE_ONCE(request->generation, from->generation);
	WRITE_ONCE(request->task, from->task);
	WRITE_ONCE(request->arg0, from->arg0);
	WRITE_ONCE(request->arg1, from->arg1);
	WRITE_ONCE(request->arg2, from->arg2);
	/* Pairs with the host's read of the whole request, which begins with seq. */
	smp_store_release(&request->seq, seq);
	kb_kick(slot);
}

/*
 * Says in each slot which open it belongs to, 0 for none; whether that was news. Anybody who can
 * write to the region can make the host take a slot for somebody else's, and hold room and tasks
 * in its name; when others are in need of them, the host ends what its slot does not name.
 */
static bool kb_restore_generations(void)
{
	bool news = false;
	unsigned int slot;

	spin_lock(&kb->slots_lock);
	for (slot = 0; slot < KB_SLOTS; slot++) {
		struct kb_instance *inst = kb->instances[slot];
		u64 generation = inst ? READ_ONCE(inst->generation) : 0;

		if (READ_ONCE(kb->requests[slot].generation) != generation) {
			WRITE_ONCE(kb->requests[slot].generation, generation);
			news = true;
		}
	}
	spin_unlock(&kb->slots_lock);
	return news;
}

/* Sends inst->request and waits for its answer; see kb_call(). */
static int kb_ask(struct kb_instance *inst)
{
	u64 error;

	inst->seq = atomic64_inc_return(&kb_next);
	kb_send(inst->slot, inst->seq, &inst->request);
	if (!kb_wait(inst->slot, inst->seq)) {
		inst->unanswered = inst->request.op;
		atomic64_inc(&inst->timeouts);
		kb_host_lost(inst->slot, inst->seq);
		return -EIO;
	}
	WRITE_ONCE(inst->answered, true);
	error = READ_ONCE(kb->responses[inst->slot].error);
	return error > MAX_ERRNO ? -EIO : -(int)error;
}

/*
 * Sends a request and waits for its answer: 0, a negative errno from the host, or -EIO where there
 * is no answer. Must be called with inst->lock held.
 */
static int kb_call(struct kb_instance *inst, enum kb_op op, u64 task, u64 arg0, u64 arg1, u64 arg2)
{
	int err;

	/* Field by field: a whole struct is cleared and copied by string instructions first. */
	inst->request.op = op;
	inst->request.generation = inst->generation;
	inst->request.task = task;
	inst->request.arg0 = arg0;
	inst->request.arg1 = arg1;
	inst->request.arg2 = arg2;
	err = kb_ask(inst);
	/* Perhaps in the way is what is nobody's. */
	if ((err == -ENOMEM || err == -EBUSY || err == -EEXIST) && kb_restore_generations())
		err = kb_ask(inst);
	return err;
}

static void kb_owner_end(struct kb_instance *inst);

/* The host is to be told that @task owns the instance no more. Must be called with lock held. */
static void kb_owe_exit(struct kb_instance *inst, u64 task, u64 untold)
{
	inst->exit_owed = task;
	inst->exit_untold = untold;
}

/*
 * Makes the slot usable for a request: where the last one was given up, its caller was told that
 * it failed; what the host made of it later is undone or followed. Must be called with inst->lock
 * held. False while the host has not answered.
 */
static bool kb_settle(struct kb_instance *inst)
{
	u64 op = inst->unanswered;
	bool done;

	if (kb_host_gone())
		return false;
	if (likely(!op && !inst->exit_owed))
		return true;
	if (op && !kb_answered(inst->slot, inst->seq)) {
		/* Overwritten on its way, perhaps. The answer is for the next caller. */
		kb_send(inst->slot, inst->seq, &inst->request);
		return false;
	}
	inst->unanswered = 0;
	done = op && !READ_ONCE(kb->responses[inst->slot].error);
	if (op == KB_OP_INIT && done)
		WRITE_ONCE(inst->generation, (u64)atomic64_inc_return(&kb_next));
	else if ((op == KB_OP_ENABLE || op == KB_OP_UNIQUE || op == KB_OP_REMOTE) && done)
		kb_owe_exit(inst, inst->request.task, 0);
	else if ((op == KB_OP_DISABLE || op == KB_OP_CLOSE) && done)
		kb_owner_end(inst);
	if (inst->exit_owed) {
		u64 id = inst->exit_owed;

		inst->exit_owed = 0;
		kb_call(inst, KB_OP_EXIT, id, 0, inst->exit_untold, 0);
	}
	return !inst->unanswered;
}

/* ---- a host that watches this kernel ------------------------------------------------------- */

/*
 * From here to kb_show() the owner runs what is ours: none of it is its own. Only the task itself
 * says so.
 */
static void kb_hide(const struct kb_owner *owner)
{
	if (!kb_watched)
		return;
	WRITE_ONCE(kb->requests[owner->inst->slot].hidden, KB_HIDDEN_YES);
	barrier();
}

static void kb_show(const struct kb_owner *owner)
{
	if (!kb_watched)
		return;
	barrier();
	WRITE_ONCE(kb->requests[owner->inst->slot].hidden, KB_HIDDEN_NO);
}

/*
 * A sign to the plugin in QEMU (bridge/sources/guest_kernel/tcg/kcov_tcg.c): a NOP that nobody else
 * writes, first in a block of its own. Within one page, so that its physical address is known.
 */
static noinline notrace __aligned(64) void kb_marker(void)
{
	asm volatile("jmp 1f\n1: .byte 0x0f, 0x1f, 0x80, 'k', 'c', 'o', 'v'" : : : "memory");
}

/*
 * Waits until the plugin watches the owner, which is hidden meanwhile. While nobody traces it looks
 * at no code, so there is no sign to be seen; but it learns that there is an owner now when a vCPU
 * halts.
 */
static void kb_await_watcher(const struct kb_owner *owner)
{
	const u64 *hidden = &kb->requests[owner->inst->slot].hidden;
	ktime_t end = ktime_add_ms(ktime_get(), READ_ONCE(kb_timeout_ms));

	for (;;) {
		kb_marker();
		if (READ_ONCE(*hidden) == KB_HIDDEN_SEEN || ktime_after(ktime_get(), end))
			return;
		/* The next interrupt ends it, a timer's tick at the latest. */
		asm volatile("hlt" : : : "memory");
	}
}

/* ---- owners -------------------------------------------------------------------------------- */

static void kb_owner_free(struct kref *ref)
{
	struct kb_owner *owner = container_of(ref, struct kb_owner, ref);
	struct kb_instance *inst = owner->inst;

	put_task_struct(owner->task);
	kfree_rcu(owner, rcu);
	kref_put(&inst->ref, kb_instance_free);
}

static void kb_owner_put(struct kb_owner *owner)
{
	kref_put(&owner->ref, kb_owner_free);
}

/* What @task owns, or NULL. The answer holds for current; for others the caller must know. */
static struct kb_owner *kb_owner_of(struct task_struct *task)
{
	struct kb_owner *owner, *found = NULL;

	rcu_read_lock();
	hash_for_each_possible_rcu(kb_owners, owner, node, (unsigned long)task) {
		if (owner->task == task) {
			found = owner;
			break;
		}
	}
	rcu_read_unlock();
	return found;
}

/* As kb_hide() and kb_show(), for whoever it is that uses the device. */
static void kb_hide_current(void)
{
	struct kb_owner *owner = kb_watched ? kb_owner_of(current) : NULL;

	if (owner)
		kb_hide(owner);
}

static void kb_show_current(void)
{
	struct kb_owner *owner = kb_watched ? kb_owner_of(current) : NULL;

	if (owner)
		kb_show(owner);
}

/*
 * The instance has no owner any more. Must be called with inst->lock held, by somebody who holds a
 * reference to the instance.
 */
static void kb_owner_end(struct kb_instance *inst)
{
	struct kb_owner *owner = inst->owner;

	if (!owner)
		return;
	spin_lock(&kb_owners_lock);
	hash_del_rcu(&owner->node);
	spin_unlock(&kb_owners_lock);
	WRITE_ONCE(inst->owner, NULL);
	kb_owner_put(owner);
}

/* The owner is exiting: tell the host. Must be called with inst->lock held. */
static void kb_owner_exits(struct kb_instance *inst)
{
	/* Sent now, or by whoever finds the host back. */
	kb_owe_exit(inst, inst->owner->id, READ_ONCE(inst->owner->untold));
	kb_owner_end(inst);
	kb_settle(inst);
}

/*
 * Takes the instance for an operation. An owner that is on its way out lets go of its mappings,
 * and so tells those who join it, before its exit work runs: do that work for it.
 */
static void kb_lock(struct kb_instance *inst)
{
	mutex_lock(&inst->lock);
	if (inst->owner && inst->owner->task != current &&
	    (READ_ONCE(inst->owner->task->flags) & PF_EXITING))
		kb_owner_exits(inst);
}

/*
 * Whether the host may have something for the owner. What has been covered for an answer that the
 * task has got shows here: news was written before the answer was passed on. A value is never
 * written twice, so each owner finds out by itself, whatever the others do.
 */
static bool kb_news(const struct kb_owner *owner)
{
	u64 news = READ_ONCE(kb->header->news);

	return !news || news != owner->seen;
}

/* Has the host append what it has for the owner. Must be called with inst->lock held. */
static void kb_fetch(struct kb_owner *owner)
{
	struct kb_instance *inst = owner->inst;
	/* Before the host looks: what is covered after its look is news again. */
	u64 news = READ_ONCE(kb->header->news);
	u64 untold = owner->untold;

	if (!kb_settle(inst)) {
		atomic64_inc(&inst->skipped);
		WRITE_ONCE(kb->header->guest_skipped, atomic64_inc_return(&kb->skipped));
		return;
	}
	owner->untold = 0;
	if (!kb_call(inst, KB_OP_RETURN, owner->id, owner->nr, untold, 0))
		owner->seen = news;
}

/* A system call of the owner is about to return to user mode. Process context, may sleep. */
static void kb_return_work(struct callback_head *head)
{
	struct kb_owner *owner = container_of(head, struct kb_owner, return_work);
	struct kb_instance *inst = owner->inst;

	/*
	 * Works run in the reverse order of their queueing: what the call left for its end, as
	 * close() leaves the last reference to a file, would come after us. Let it go first.
	 */
	if (head->next && !kb_task_work_add(current, head, TWA_RESUME)) {
		kb_show(owner);
		return;
	}
	owner->return_queued = false;
	mutex_lock(&inst->lock);
	if (inst->owner == owner) {
		kb_hide(owner);
		if (kb_news(owner))
			kb_fetch(owner);
		else
			WRITE_ONCE(owner->untold, owner->untold + 1);
		kb_show(owner);
	}
	mutex_unlock(&inst->lock);
	kb_owner_put(owner);
}

static void kb_exit_work(struct callback_head *head)
{
	struct kb_owner *owner = container_of(head, struct kb_owner, exit_work);
	struct kb_instance *inst = owner->inst;

	mutex_lock(&inst->lock);
	if (inst->owner == owner)
		kb_owner_exits(inst);
	mutex_unlock(&inst->lock);
	kb_owner_put(owner);
}

/*
 * A probe on a tracepoint of system calls makes every task take the slow way in and out, by a flag
 * in each that its children inherit. Where nobody but us has a probe there, a task that owns
 * nothing loses its flag at its first system call, and an owner has it from kb_enable() on.
 */
static void kb_let_go(void)
{
	if (!READ_ONCE(kb_alone))
		return;
	clear_syscall_work(SYSCALL_TRACEPOINT);
	/* Pairs with the one in kb_share(): either we see that, or it sets the flag after us. */
	smp_mb__after_atomic();
	if (!READ_ONCE(kb_alone))
		set_syscall_work(SYSCALL_TRACEPOINT);
}

/* Tracepoint sys_exit, for system calls of owners, and of others at times. */
static void kb_sys_exit(void *unused, struct pt_regs *regs, long ret)
{
	struct kb_owner *owner = kb_owner_of(current);

	if (likely(!owner)) {
		kb_let_go();
		return;
	}
	if (owner->return_queued)
		return;
	/* A work that is queued already may yet make news. */
	if (owner->silent || (!kb_news(owner) && !READ_ONCE(current->task_works))) {
		WRITE_ONCE(owner->untold, owner->untold + 1);
		return;
	}
	kb_hide(owner);
	owner->nr = syscall_get_nr(current, regs);
	owner->return_queued = true;
	kref_get(&owner->ref);
	if (kb_task_work_add(current, &owner->return_work, TWA_RESUME)) {
		owner->return_queued = false;
		kb_show(owner);
		kb_owner_put(owner);
	}
}

/* Tracepoint sched_process_exit, in the exiting task, before its last task works run. */
static void kb_process_exit(void *unused, struct task_struct *task)
{
	struct kb_owner *owner = kb_owner_of(current);

	if (likely(!owner))
		return;
	kref_get(&owner->ref);
	if (kb_task_work_add(current, &owner->exit_work, TWA_NONE))
		kb_owner_put(owner);
}

/* ---- hooks --------------------------------------------------------------------------------- */

static void kb_match_tracepoint(struct tracepoint *tp, void *unused)
{
	if (!strcmp(tp->name, "sys_enter"))
		kb_tp_sys_enter = tp;
	else if (!strcmp(tp->name, "sys_exit"))
		kb_tp_sys_exit = tp;
	else if (!strcmp(tp->name, "sched_process_exit"))
		kb_tp_process_exit = tp;
}

#ifdef KB_TASK_WORK_EXPORTED
static void kb_find_task_work_add(void)
{
	kb_task_work_add = task_work_add;
}
#else
static void kb_find_task_work_add(void)
{
	struct kprobe probe = { .symbol_name = "task_work_add" };

	/* A kprobe knows the address of what the kernel does not export. */
	if (!register_kprobe(&probe)) {
		kb_task_work_add = (void *)probe.addr;
		unregister_kprobe(&probe);
	}
}
#endif

static int kb_find_hooks(void)
{
	for_each_kernel_tracepoint(kb_match_tracepoint, NULL);
	if (!kb_tp_sys_exit || !kb_tp_process_exit) {
		pr_err("this kernel lacks the tracepoint %s (CONFIG_FTRACE_SYSCALLS)\n",
		       kb_tp_sys_exit ? "sched_process_exit" : "sys_exit");
		return -EOPNOTSUPP;
	}
	kb_find_task_work_add();
	if (!kb_task_work_add) {
		pr_err("this kernel neither exports task_work_add() nor has kprobes to find it\n");
		return -EOPNOTSUPP;
	}
	return 0;
}

static void kb_flag_all(void)
{
	struct task_struct *process, *task;

	rcu_read_lock();
	for_each_process_thread(process, task)
		set_task_syscall_work(task, SYSCALL_TRACEPOINT);
	rcu_read_unlock();
}

static void kb_flag_latecomers(struct work_struct *unused)
{
	kb_flag_all();
}
static DECLARE_DELAYED_WORK(kb_flag_work, kb_flag_latecomers);

/* Somebody else wants to see system calls: all tasks are to have their flag again, for good. */
static void kb_share(void)
{
	WRITE_ONCE(kb_alone, false);
	/* Pairs with the one in kb_let_go(). */
	smp_mb();
	kb_flag_all();
	/* Once more for tasks that are being forked: they take over what their parent had. */
	schedule_delayed_work(&kb_flag_work, msecs_to_jiffies(20));
}

/* Before a probe is added to any tracepoint, so that it misses nothing. */
static int kb_probe_comes(struct kprobe *unused, struct pt_regs *regs)
{
	unsigned long tp = regs_get_kernel_argument(regs, 0);
	unsigned long probe = regs_get_kernel_argument(regs, 1);

	if ((tp == (unsigned long)kb_tp_sys_enter || tp == (unsigned long)kb_tp_sys_exit) &&
	    probe != (unsigned long)kb_sys_exit)
		kb_share();
	return 0;
}

/* All ways to add one: kernel/tracepoint.c. */
static struct kprobe kb_adding[] = {
	{ .symbol_name = "tracepoint_probe_register", .pre_handler = kb_probe_comes },
	{ .symbol_name = "tracepoint_probe_register_prio", .pre_handler = kb_probe_comes },
	{ .symbol_name = "tracepoint_probe_register_prio_may_exist",
	  .pre_handler = kb_probe_comes },
};
static struct kprobe *kb_adding_probes[] = { &kb_adding[0], &kb_adding[1], &kb_adding[2] };
static bool kb_adding_seen;

static bool kb_has_probes_of_others(struct tracepoint *tp)
{
	const struct tracepoint_func *funcs;
	bool others = false;

	preempt_disable();
	funcs = rcu_dereference_sched(tp->funcs);
	for (; funcs && funcs->func; funcs++)
		others |= funcs->func != kb_sys_exit;
	preempt_enable();
	return others;
}

/*
 * From here on tasks lose the flag that the tracepoint gave them, unless others need it or it could
 * not be seen when they do. Must be called with kb_hook_lock held, sys_exit hooked.
 */
static void kb_begin_to_let_go(void)
{
	if (!kb_tp_sys_enter ||
	    register_kprobes(kb_adding_probes, ARRAY_SIZE(kb_adding_probes))) {
		pr_info("system calls of all tasks are slower while the device is in use\n");
		return;
	}
	kb_adding_seen = true;
	WRITE_ONCE(kb_alone, true);
	/* After that, so that one who comes now is seen in one way or the other. */
	smp_mb();
	if (kb_has_probes_of_others(kb_tp_sys_enter) || kb_has_probes_of_others(kb_tp_sys_exit))
		kb_share();
}

/* Must be called with kb_hook_lock held, sys_exit not hooked any more. */
static void kb_end_letting_go(void)
{
	if (!kb_adding_seen)
		return;
	unregister_kprobes(kb_adding_probes, ARRAY_SIZE(kb_adding_probes));
	cancel_delayed_work_sync(&kb_flag_work);
	kb_adding_seen = false;
	WRITE_ONCE(kb_alone, false);
}

/* The tracepoints are left alone until the first ENABLE. */
static int kb_hook(void)
{
	int err = 0;

	mutex_lock(&kb_hook_lock);
	if (!kb_hooked) {
		err = tracepoint_probe_register(kb_tp_process_exit, kb_process_exit, NULL);
		if (!err) {
			err = tracepoint_probe_register(kb_tp_sys_exit, kb_sys_exit, NULL);
			if (err)
				tracepoint_probe_unregister(kb_tp_process_exit, kb_process_exit,
							    NULL);
		}
		kb_hooked = !err;
		if (kb_hooked)
			kb_begin_to_let_go();
	}
	mutex_unlock(&kb_hook_lock);
	return err;
}

static void kb_unhook(void)
{
	mutex_lock(&kb_hook_lock);
	if (kb_hooked) {
		tracepoint_probe_unregister(kb_tp_sys_exit, kb_sys_exit, NULL);
		tracepoint_probe_unregister(kb_tp_process_exit, kb_process_exit, NULL);
		kb_end_letting_go();
		kb_hooked = false;
	}
	mutex_unlock(&kb_hook_lock);
	tracepoint_synchronize_unregister();
}

/* ---- the device ---------------------------------------------------------------------------- */

static int kb_slot_take(struct kb_instance *inst)
{
	const struct kb_request release = { .op = KB_OP_RELEASE };
	unsigned int slot;

	spin_lock(&kb->slots_lock);
	for_each_set_bit(slot, kb->zombies, KB_SLOTS) {
		if (kb_answered(slot, kb->zombie_seq[slot])) {
			__clear_bit(slot, kb->zombies);
			__clear_bit(slot, kb->slots);
		} else {
			kb_send(slot, kb->zombie_seq[slot], &release);
		}
	}
	slot = find_first_zero_bit(kb->slots, KB_SLOTS);
	if (slot < KB_SLOTS) {
		__set_bit(slot, kb->slots);
		kb->instances[slot] = inst;
	}
	spin_unlock(&kb->slots_lock);
	return slot < KB_SLOTS ? (int)slot : -ENOMEM;
}

static void kb_slot_give_back(unsigned int slot, u64 unanswered_seq)
{
	spin_lock(&kb->slots_lock);
	kb->instances[slot] = NULL;
	if (unanswered_seq) {
		kb->zombie_seq[slot] = unanswered_seq;
		__set_bit(slot, kb->zombies);
	} else {
		__clear_bit(slot, kb->slots);
	}
	spin_unlock(&kb->slots_lock);
}

/* The last reference is gone. Process context, may sleep. */
static void kb_instance_free(struct kref *ref)
{
	struct kb_instance *inst = container_of(ref, struct kb_instance, ref);

	mutex_lock(&inst->lock);
	if (inst->seq && kb_settle(inst))
		kb_call(inst, KB_OP_RELEASE, 0, 0, 0, 0);
	mutex_unlock(&inst->lock);
	kb_slot_give_back(inst->slot, inst->unanswered ? inst->seq : 0);
	mutex_destroy(&inst->lock);
	kfree(inst);
	module_put(THIS_MODULE);
}

static int kb_open(struct inode *inode, struct file *file)
{
	struct kb_instance *inst;
	int slot;

	inst = kzalloc(sizeof(*inst), GFP_KERNEL);
	if (!inst)
		return -ENOMEM;
	slot = kb_slot_take(inst);
	if (slot < 0) {
		kfree(inst);
		return slot;
	}
	/* An owner keeps the instance after the last close. */
	__module_get(THIS_MODULE);
	kref_init(&inst->ref);
	mutex_init(&inst->lock);
	inst->slot = slot;
	inst->generation = atomic64_inc_return(&kb_next);
	file->private_data = inst;
	return nonseekable_open(inode, file);
}

/* No descriptor is left, though mappings may be. The host says whether that ends the owner. */
static void kb_closed(struct kb_instance *inst)
{
	kb_hide_current();
	kb_lock(inst);
	if (inst->owner && (current->flags & PF_EXITING) && inst->owner->task == current)
		kb_owner_exits(inst);
	else if (inst->owner && kb_settle(inst) &&
		 !kb_call(inst, KB_OP_CLOSE, inst->owner->id, 0, READ_ONCE(inst->owner->untold), 0))
		kb_owner_end(inst);
	mutex_unlock(&inst->lock);
	kb_show_current();
}

/* A descriptor is closed. */
static int kb_flush(struct file *file, fl_owner_t id)
{
	struct kb_instance *inst = file->private_data;

	/*
	 * Each mapping holds the file, and is counted for less long than it does; whoever else
	 * holds it is or may become a descriptor.
	 */
	if (file_count(file) - atomic_read(&inst->mappings) <= 1)
		kb_closed(inst);
	return 0;
}

static int kb_release(struct inode *inode, struct file *file)
{
	struct kb_instance *inst = file->private_data;

	/* The last may have been a descriptor that nobody took out of its message. */
	kb_closed(inst);
	kref_put(&inst->ref, kb_instance_free);
	return 0;
}

/* @op is one of those that begin to trace. Must be called with inst->lock held, slot settled. */
static int kb_enable(struct kb_instance *inst, enum kb_op op, u64 arg0, u64 arg1, u64 arg2)
{
	struct kb_owner *mine = kb_owner_of(current);
	struct kb_owner *owner;
	int err;

	err = kb_hook();
	if (err)
		return err;
	owner = kzalloc(sizeof(*owner), GFP_KERNEL);
	if (!owner)
		return -ENOMEM;
	kref_init(&owner->ref);
	owner->task = current;
	owner->inst = inst;
	/*
	 * A task that traces through another instance shows the id that the host knows: the host
	 * refuses it. The number above the thread id makes up for thread ids that change hands.
	 */
	owner->id = mine ? mine->id :
		    (u64)atomic_inc_return(&kb_next_owner) << 32 | (u32)task_pid_nr(current);
	init_task_work(&owner->return_work, kb_return_work);
	init_task_work(&owner->exit_work, kb_exit_work);
	/* Until kb_show_current(): the host may watch the task from its answer on. */
	if (!inst->owner)
		kb_hide(owner);
	err = kb_call(inst, op, owner->id, arg0, arg1, arg2);
	if (err) {
		kfree(owner);
		return err;
	}
	owner->silent = READ_ONCE(kb->responses[inst->slot].flags) & KB_ANSWER_SILENT;
	if (kb_watched && op != KB_OP_REMOTE)
		kb_await_watcher(owner);
	get_task_struct(owner->task);
	kref_get(&inst->ref);
	WRITE_ONCE(inst->owner, owner);
	spin_lock(&kb_owners_lock);
	hash_add_rcu(kb_owners, &owner->node, (unsigned long)owner->task);
	spin_unlock(&kb_owners_lock);
	set_syscall_work(SYSCALL_TRACEPOINT);
	return 0;
}

/* The argument of KCOV_REMOTE_ENABLE, as far as it could be read. */
struct kb_remote {
	u32 mode;
	u32 area_size;
	/* As the user has it, perhaps more than there are below; ~0 if it could not be read. */
	u64 count;
	u64 common_handle;
	u64 handles[KCOV_REMOTE_MAX_HANDLES];
};

/* Reads the argument. Before any lock: a page fault takes mmap_lock, inside which kb_mmap locks. */
static struct kb_remote *kb_read_remote(const struct kcov_remote_arg __user *user)
{
	struct kb_remote *remote = kzalloc(sizeof(*remote), GFP_KERNEL);
	struct kcov_remote_arg arg;

	if (!remote)
		return NULL;
	remote->count = ~0ULL;
	if (copy_from_user(&arg, user, sizeof(arg)))
		return remote;
	if (arg.num_handles <= KCOV_REMOTE_MAX_HANDLES &&
	    copy_from_user(remote->handles, user->handles, arg.num_handles * sizeof(u64)))
		return remote;
	remote->mode = arg.trace_mode;
	remote->area_size = arg.area_size;
	remote->common_handle = arg.common_handle;
	remote->count = arg.num_handles;
	return remote;
}

/* Hands the argument to the host, which checks it. Must be called with inst->lock held, settled. */
static int kb_remote_enable(struct kb_instance *inst, const struct kb_remote *remote)
{
	int err;

	mutex_lock(&kb->payload_lock);
	if (remote->count <= KCOV_REMOTE_MAX_HANDLES)
		memcpy(kb->payload, remote->handles, remote->count * sizeof(u64));
	err = kb_enable(inst, KB_OP_REMOTE, remote->mode | (u64)remote->area_size << 32,
			remote->count, remote->common_handle);
	mutex_unlock(&kb->payload_lock);
	return err;
}

/* How the host knows current, if it traces; no owner has an id without a number above. */
static u64 kb_own_id(void)
{
	struct kb_owner *mine = kb_owner_of(current);

	return mine ? mine->id : (u32)task_pid_nr(current);
}

/* @remote is the argument of KCOV_REMOTE_ENABLE. Must be called with inst->lock held, settled. */
static long kb_control(struct kb_instance *inst, unsigned int cmd, unsigned long arg,
		       const struct kb_remote *remote)
{
	const struct kb_owner *mine = kb_owner_of(current);
	long err;

	switch (cmd) {
	case KCOV_INIT_TRACE:
		return kb_call(inst, KB_OP_INIT, 0, arg, 0, 0);
	case KCOV_ENABLE:
		return kb_enable(inst, KB_OP_ENABLE, arg, (unsigned long)current, 0);
	case KCOV_UNIQUE_ENABLE:
		return kb_enable(inst, KB_OP_UNIQUE, arg, (unsigned long)current, 0);
	case KCOV_REMOTE_ENABLE:
		return kb_remote_enable(inst, remote);
	case KCOV_RESET_TRACE:
		return kb_call(inst, KB_OP_RESET, kb_own_id(), arg, 0, 0);
	case KCOV_DISABLE:
		err = kb_call(inst, KB_OP_DISABLE, kb_own_id(), arg, mine ? mine->untold : 0, 0);
		if (!err)
			kb_owner_end(inst);
		return err;
	default:
		return -ENOTTY;
	}
}

static long kb_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kb_instance *inst = file->private_data;
	struct kb_remote *remote = NULL;
	long err;

	if (cmd == KCOV_REMOTE_ENABLE) {
		remote = kb_read_remote((struct kcov_remote_arg __user *)arg);
		if (!remote)
			return -ENOMEM;
	}
	kb_hide_current();
	kb_lock(inst);
	err = kb_settle(inst) ? kb_control(inst, cmd, arg, remote) : -EIO;
	mutex_unlock(&inst->lock);
	kfree(remote);
	kb_show_current();
	return err;
}

static void kb_vma_open(struct vm_area_struct *vma)
{
	struct kb_instance *inst = vma->vm_private_data;

	atomic_inc(&inst->mappings);
}

static void kb_vma_close(struct vm_area_struct *vma)
{
	struct kb_instance *inst = vma->vm_private_data;

	atomic_dec(&inst->mappings);
}

static const struct vm_operations_struct kb_vm_ops = {
	.open	= kb_vma_open,
	.close	= kb_vma_close,
	/* ptrace and /proc/PID/mem. */
	.access	= generic_access_phys,
};

static int kb_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kb_instance *inst = file->private_data;
	unsigned long length = vma->vm_end - vma->vm_start;
	u64 offset = 0;
	int err;

	kb_hide_current();
	kb_lock(inst);
	err = kb_settle(inst) ? kb_call(inst, KB_OP_MAP, 0, length, vma->vm_pgoff,
					atomic_read(&inst->mappings)) : -EIO;
	if (!err)
		offset = READ_ONCE(kb->responses[inst->slot].area_offset);
	mutex_unlock(&inst->lock);
	kb_show_current();
	if (err)
		return err;
	if (offset < KB_AREAS_OFFSET || !PAGE_ALIGNED(offset) || offset > kb->region_bytes ||
	    length > kb->region_bytes - offset)
		return -EIO;
	err = remap_pfn_range(vma, vma->vm_start, (kb->region_start + offset) >> PAGE_SHIFT, length,
			      vma->vm_page_prot);
	if (err)
		return err;
	vma->vm_private_data = inst;
	vma->vm_ops = &kb_vm_ops;
	atomic_inc(&inst->mappings);
	return 0;
}

static const struct file_operations kb_fops = {
	.owner		= THIS_MODULE,
	.open		= kb_open,
	.flush		= kb_flush,
	.release	= kb_release,
	.unlocked_ioctl	= kb_ioctl,
	.compat_ioctl	= kb_ioctl,
	.mmap		= kb_mmap,
};

static struct miscdevice kb_misc = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "kcov",
	.mode	= 0600,
	.fops	= &kb_fops,
};

/* Beside the kernel's own kcov where it has one. */
static const char *kb_file_name(void)
{
	struct dentry *own = debugfs_lookup("kcov", NULL);

	if (!own)
		return "kcov";
	dput(own);
	return "kcov_bridge";
}

/* ---- a host that watches this kernel: what it is told ---------------------------------------- */

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0) && LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
#define kb_current_task(cpu)	per_cpu_ptr(&pcpu_hot.current_task, cpu)
#define kb_preempt_count(cpu)	per_cpu_ptr(&pcpu_hot.preempt_count, cpu)
#else
#define kb_current_task(cpu)	per_cpu_ptr(&current_task, cpu)
#define kb_preempt_count(cpu)	per_cpu_ptr(&__preempt_count, cpu)
#endif

static void kb_describe_kernel(struct kb_kernel *kernel)
{
	struct desc_ptr table;
	const gate_desc *gates;
	unsigned int cpu, vector;

	memset(kernel, 0, sizeof(*kernel));
	for_each_possible_cpu(cpu) {
		unsigned int id = cpu_physical_id(cpu);

		if (id >= KB_KERNEL_CPUS)
			continue;
		kernel->cpu[id].current_task = slow_virt_to_phys((void *)kb_current_task(cpu));
		kernel->cpu[id].preempt_count = slow_virt_to_phys((void *)kb_preempt_count(cpu));
	}
	kernel->cpus = num_possible_cpus();
	kernel->syscall_entry = __rdmsr(MSR_LSTAR);
	kernel->marker = (unsigned long)kb_marker;
	kernel->marker_physical = slow_virt_to_phys(kb_marker);
	store_idt(&table);
	gates = (const gate_desc *)table.address;
	for (vector = 0; vector < ARRAY_SIZE(kernel->vectors); vector++)
		if ((vector + 1) * sizeof(*gates) <= table.size + 1)
			kernel->vectors[vector] = gate_offset(&gates[vector]);
}

/* This kernel is @here, or will not be from now on. Answers whether the host cares. */
static bool kb_tell_kernel(bool here)
{
	struct kb_kernel *kernel = (struct kb_kernel *)kb->payload;
	int err = -EIO;

	mutex_lock(&kb_self.lock);
	mutex_lock(&kb->payload_lock);
	if (here)
		kb_describe_kernel(kernel);
	else
		memset(kernel, 0, sizeof(*kernel));
	if (kb_settle(&kb_self))
		err = kb_call(&kb_self, KB_OP_KERNEL, 0, 0, 0, 0);
	mutex_unlock(&kb->payload_lock);
	mutex_unlock(&kb_self.lock);
	/* A halt, at which the plugin in QEMU throws away what it knows of the code of before. */
	if (!err)
		asm volatile("hlt" : : : "memory");
	return !err;
}

/* Reboot, power-off, or kexec: another kernel may run in this memory before the host sees it. */
static int kb_reboot_event(struct notifier_block *block, unsigned long event, void *data)
{
	kb_hide_current();
	kb_tell_kernel(false);
	kb_show_current();
	return NOTIFY_DONE;
}

static struct notifier_block kb_reboot_notifier = {
	.notifier_call	= kb_reboot_event,
};

/* A module's code is there, and has not run yet; or it has run for the last time. */
static int kb_module_event(struct notifier_block *block, unsigned long event, void *data)
{
	struct module *mod = data;
	u64 text, bytes;

	if (event != MODULE_STATE_COMING && event != MODULE_STATE_GOING)
		return NOTIFY_DONE;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	text = (unsigned long)mod->mem[MOD_TEXT].base;
	bytes = mod->mem[MOD_TEXT].size;
#else
	text = (unsigned long)mod->core_layout.base;
	bytes = mod->core_layout.text_size;
#endif
	kb_hide_current();
	mutex_lock(&kb_self.lock);
	mutex_lock(&kb->payload_lock);
	memset(kb->payload, 0, MODULE_NAME_LEN);
	strscpy((char *)kb->payload, mod->name, MODULE_NAME_LEN);
	if (kb_settle(&kb_self))
		kb_call(&kb_self, KB_OP_MODULE, 0, event == MODULE_STATE_COMING, text, bytes);
	mutex_unlock(&kb->payload_lock);
	mutex_unlock(&kb_self.lock);
	kb_show_current();
	return NOTIFY_DONE;
}

static struct notifier_block kb_module_notifier = {
	.notifier_call	= kb_module_event,
};

static int kb_listen(void)
{
	int err;

	err = register_module_notifier(&kb_module_notifier);
	if (err)
		return err;
	err = register_reboot_notifier(&kb_reboot_notifier);
	if (err)
		unregister_module_notifier(&kb_module_notifier);
	return err;
}

static void kb_stop_listening(void)
{
	unregister_reboot_notifier(&kb_reboot_notifier);
	unregister_module_notifier(&kb_module_notifier);
}

/* Tells the host, and from then on what changes, as long as it wants to know. */
static int kb_tell(void)
{
	bool before = kb_watched;
	int err = 0;

	kb_watched = kb_tell_kernel(true);
	if (kb_watched && !before) {
		err = kb_listen();
		kb_watched = !err;
	} else if (before && !kb_watched) {
		kb_stop_listening();
	}
	return err;
}

static int kb_begin_to_tell(void)
{
	int slot;

	mutex_init(&kb_self.lock);
	slot = kb_slot_take(NULL);
	if (slot < 0)
		return slot;
	kb_self.slot = slot;
	kb_self.generation = atomic64_inc_return(&kb_next);
	return kb_tell();
}

static void kb_end_to_tell(void)
{
	if (kb_watched)
		kb_stop_listening();
	kb_watched = false;
	mutex_destroy(&kb_self.lock);
}

/*
 * The agent writes here when the guest goes on from a snapshot: the host is another, and knows
 * nothing of this kernel.
 */
static ssize_t kb_host_write(struct file *file, const char __user *data, size_t size, loff_t *at)
{
	static DEFINE_MUTEX(one_at_a_time);
	int err;

	mutex_lock(&one_at_a_time);
	err = kb_tell();
	mutex_unlock(&one_at_a_time);
	return err ? err : (ssize_t)size;
}

static const struct file_operations kb_host_fops = {
	.owner	= THIS_MODULE,
	.open	= simple_open,
	.write	= kb_host_write,
};

/* ---- for people ---------------------------------------------------------------------------- */

static int kb_stats_show(struct seq_file *file, void *unused)
{
	unsigned int slot;

	seq_printf(file, "host %s, timeouts %lld, skipped %lld, unreleased %d\n",
		   kb_host_gone() ? "gone" : "here", atomic64_read(&kb->timeouts),
		   atomic64_read(&kb->skipped), bitmap_weight(kb->zombies, KB_SLOTS));
	seq_puts(file, "slot owner appended dropped timeouts skipped\n");
	spin_lock(&kb->slots_lock);
	rcu_read_lock();
	for_each_set_bit(slot, kb->slots, KB_SLOTS) {
		const struct kb_response *response = &kb->responses[slot];
		struct kb_instance *inst = kb->instances[slot];
		struct kb_owner *owner;

		if (!inst)
			continue;
		owner = READ_ONCE(inst->owner);
		/* A slot's response may still be that of the instance before. */
		seq_printf(file, "%u %u %llu %llu %lld %lld\n", slot, owner ? (u32)owner->id : 0,
			   READ_ONCE(inst->answered) ? READ_ONCE(response->appended) : 0,
			   READ_ONCE(inst->answered) ? READ_ONCE(response->dropped) : 0,
			   atomic64_read(&inst->timeouts), atomic64_read(&inst->skipped));
	}
	rcu_read_unlock();
	spin_unlock(&kb->slots_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(kb_stats);

/* ---- the PCI device ------------------------------------------------------------------------ */

static int kb_check_header(struct pci_dev *pdev, const struct kb_header *header, u64 bytes)
{
	if (header->magic != KB_MAGIC) {
		dev_info(&pdev->dev, "not a region of kcov-bridge\n");
		return -ENODEV;
	}
	if (header->version != KB_VERSION || header->slots != KB_SLOTS ||
	    header->requests_offset != KB_REQUESTS_OFFSET ||
	    header->responses_offset != KB_RESPONSES_OFFSET ||
	    header->areas_offset != KB_AREAS_OFFSET || header->region_bytes != bytes) {
		dev_err(&pdev->dev,
			"the region is of version %llu, this module of %d: rebuild the image\n",
			header->version, KB_VERSION);
		return -EPROTO;
	}
	return 0;
}

static int kb_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct kb_bridge *bridge;
	void *control;
	int err;

	if (kb)
		return -EBUSY;
	bridge = devm_kzalloc(&pdev->dev, sizeof(*bridge), GFP_KERNEL);
	if (!bridge)
		return -ENOMEM;
	err = pcim_enable_device(pdev);
	if (err)
		return err;
	err = pcim_iomap_regions(pdev, BIT(KB_BAR_REGISTERS), KBUILD_MODNAME);
	if (err)
		return err;
	bridge->registers = pcim_iomap_table(pdev)[KB_BAR_REGISTERS];
	bridge->pdev = pdev;
	bridge->region_start = pci_resource_start(pdev, KB_BAR_REGION);
	bridge->region_bytes = pci_resource_len(pdev, KB_BAR_REGION);
	if (bridge->region_bytes < KB_AREAS_OFFSET + PAGE_SIZE)
		return -ENODEV;
	if (!devm_request_mem_region(&pdev->dev, bridge->region_start, bridge->region_bytes,
				     KBUILD_MODNAME))
		return -EBUSY;
	control = devm_memremap(&pdev->dev, bridge->region_start, KB_AREAS_OFFSET, MEMREMAP_WB);
	if (IS_ERR(control))
		return PTR_ERR(control);
	bridge->header = control;
	bridge->requests = control + KB_REQUESTS_OFFSET;
	bridge->responses = control + KB_RESPONSES_OFFSET;
	bridge->payload = control + KB_PAYLOAD_OFFSET;
	err = kb_check_header(pdev, bridge->header, bridge->region_bytes);
	if (err)
		return err;
	bridge->host_peer = bridge->header->host_peer;
	spin_lock_init(&bridge->slots_lock);
	spin_lock_init(&bridge->lost_lock);
	mutex_init(&bridge->payload_lock);

	kb = bridge;
	err = kb_begin_to_tell();
	if (err)
		goto fail;
	err = misc_register(&kb_misc);
	if (err)
		goto silent;
	bridge->file = debugfs_create_file_unsafe(kb_file_name(), 0600, NULL, NULL, &kb_fops);
	if (IS_ERR(bridge->file)) {
		dev_info(&pdev->dev, "no debugfs: the device is /dev/%s alone\n", kb_misc.name);
		bridge->file = NULL;
	}
	bridge->stats = debugfs_create_file("kcov_bridge_stats", 0400, NULL, NULL, &kb_stats_fops);
	bridge->host = debugfs_create_file("kcov_bridge_host", 0200, NULL, NULL, &kb_host_fops);
	pci_set_drvdata(pdev, bridge);
	dev_info(&pdev->dev, "kcov from the host, %llu MiB shared\n", bridge->region_bytes >> 20);
	return 0;

silent:
	kb_end_to_tell();
fail:
	kb = NULL;
	return err;
}

static void kb_remove(struct pci_dev *pdev)
{
	struct kb_bridge *bridge = pci_get_drvdata(pdev);

	debugfs_remove(bridge->host);
	debugfs_remove(bridge->stats);
	debugfs_remove(bridge->file);
	misc_deregister(&kb_misc);
	kb_unhook();
	kb_end_to_tell();
	/* Owners that were freed under RCU. */
	rcu_barrier();
	kb = NULL;
}

static const struct pci_device_id kb_ids[] = {
	{ PCI_DEVICE(KB_PCI_VENDOR_ID, KB_PCI_DEVICE_ID) },
	{ }
};
MODULE_DEVICE_TABLE(pci, kb_ids);

static struct pci_driver kb_driver = {
	.name		= KBUILD_MODNAME,
	.id_table	= kb_ids,
	.probe		= kb_probe,
	.remove		= kb_remove,
	/* Instances hold the module, and nothing else may take the device from them. */
	.driver.suppress_bind_attrs = true,
};

static int __init kb_init(void)
{
	int err;

	BUILD_BUG_ON(sizeof(struct kb_header) > KB_REQUESTS_OFFSET);
	BUILD_BUG_ON(sizeof(struct kb_request) != 64);
	BUILD_BUG_ON(sizeof(struct kb_response) != 64);
	BUILD_BUG_ON(sizeof(struct kb_kernel) > KB_AREAS_OFFSET - KB_PAYLOAD_OFFSET);

	err = kb_find_hooks();
	if (err)
		return err;
	atomic64_set(&kb_next, get_random_u64() >> 1);
	err = pci_register_driver(&kb_driver);
	if (err)
		return err;
	if (!kb) {
		pr_err("no ivshmem device with a region of kcov-bridge in this machine\n");
		pci_unregister_driver(&kb_driver);
		return -ENODEV;
	}
	return 0;
}
module_init(kb_init);

static void __exit kb_exit(void)
{
	pci_unregister_driver(&kb_driver);
}
module_exit(kb_exit);

MODULE_AUTHOR("kcov-bridge developers");
MODULE_DESCRIPTION("The kcov device, filled by the host");
MODULE_LICENSE("GPL");
