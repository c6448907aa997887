// SPDX-License-Identifier: GPL-2.0
/*
 * Wires: connections of the guest to endpoints of the host's target, through the shared region.
 *
 *   open			an instance with a slot, as any
 *   ioctl(KCOV_BRIDGE_WIRE)	forwarded; the host connects to the endpoint, and answers where the
 *				connection's struct kb_wire is
 *   read, write, poll		two rings, one for each direction; nothing is forwarded
 *   close			forwarded as any release; the host sends what it has, and ends
 *
 * The host is rung after each write. It interrupts the guest when it has written, unless a task
 * polls for the answer: each write does, for a while, because an interrupt takes longer than most
 * answers. That while shrinks when it was in vain.
 *
 * Positions count bytes since the connection began. Each side has its own two in its own memory,
 * and bounds the other's. Barriers, in pairs, all full:
 *
 *	guest: guest_sent, ring			host: wakes up, guest_sent
 *	guest: guest_polls = 0, host_sent	host: host_sent, guest_polls
 *	guest: guest_full = 1, host_taken	host: host_taken, guest_full
 *	guest: guest_taken, host_full		host: host_full = 1, guest_taken
 *
 * so that of the two sides at least one sees what the other has written, and nobody sleeps for ever.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uio.h>
#include <asm/tsc.h>

#include "kcov_bridge.h"

#define KB_WIRE_LEAST_POLL_US	32

unsigned int kb_wire_spin_us = 1000;
module_param_named(wire_spin_us, kb_wire_spin_us, uint, 0644);
MODULE_PARM_DESC(wire_spin_us, "How long a write polls for an answer at most (us)");

/**
 * struct kb_wire_end - the guest's end of a connection, for one open file
 * @node: in kb_wires. Guarded by kb_wires_mutex and kb_wires_lock: either to read, both to write
 * @inst: its instance, to which it holds a reference
 * @shared: the connection, or NULL before it is made and once the device is gone. Written under
 *	kb_wires_mutex, @read_lock, @write_lock and kb_wires_lock; any of them to read it
 * @gone: the device is gone. Guarded as @shared
 * @read_lock: one reader at a time; guards @taken
 * @write_lock: one writer at a time; guards @sent
 * @taken: bytes read. Also read without the lock
 * @sent: bytes written. Also read without the lock
 * @changed: woken when the host has sent or taken something
 * @poll_us: how long the next write polls. Not guarded: any value is a good one
 * @asked: the time-stamp counter at the last write; as @poll_us
 */
struct kb_wire_end {
	struct list_head node;
	struct kb_instance *inst;
	struct kb_wire *shared;
	bool gone;
	struct mutex read_lock;
	struct mutex write_lock;
	u64 taken;
	u64 sent;
	wait_queue_head_t changed;
	unsigned int poll_us;
	u64 asked;
};

static LIST_HEAD(kb_wires);
static DEFINE_MUTEX(kb_wires_mutex);
static DEFINE_SPINLOCK(kb_wires_lock);

static u64 kb_wire_cycles(unsigned int us)
{
	return (u64)us * tsc_khz / 1000;
}

/* ---- what is there to do ------------------------------------------------------------------- */

/* Return bytes to read; positive also at the end, when read says why. Negative: the host is mad. */
static s64 kb_wire_readable_locked(const struct kb_wire_end *end)
{
	const struct kb_wire *shared = end->shared;
	u64 ended, bytes;

	if (!shared)
		return 1;
	/* The end comes after all data, so it is read first. */
	ended = smp_load_acquire(&shared->host_ended);
	bytes = smp_load_acquire(&shared->host_sent) - READ_ONCE(end->taken);
	return bytes ? (s64)bytes : !!ended;
}

static s64 kb_wire_room_locked(const struct kb_wire_end *end)
{
	const struct kb_wire *shared = end->shared;

	if (!shared || READ_ONCE(shared->host_ended))
		return 1;
	return (s64)(READ_ONCE(shared->host_taken) + KB_WIRE_RING_BYTES - READ_ONCE(end->sent));
}

static bool kb_wire_is_readable(const struct kb_wire_end *end)
{
	unsigned long flags;
	s64 bytes;

	spin_lock_irqsave(&kb_wires_lock, flags);
	bytes = kb_wire_readable_locked(end);
	spin_unlock_irqrestore(&kb_wires_lock, flags);
	return bytes != 0;
}

/* Return whether something can be written. If not, the host interrupts once there is room. */
static bool kb_wire_is_writable(const struct kb_wire_end *end)
{
	unsigned long flags;
	s64 room;

	spin_lock_irqsave(&kb_wires_lock, flags);
	room = kb_wire_room_locked(end);
	if (!room) {
		WRITE_ONCE(end->shared->guest_full, 1);
		/* Pairs with the host's: host_taken, barrier, guest_full. */
		smp_mb();
		room = kb_wire_room_locked(end);
	}
	spin_unlock_irqrestore(&kb_wires_lock, flags);
	return room != 0;
}

/* ---- notification -------------------------------------------------------------------------- */

static void kb_wire_ring(const struct kb_wire_end *end)
{
	const struct kb_bridge *bridge = end->inst->bridge;

	iowrite32(bridge->host_peer << 16 | KB_WIRE_VECTOR, bridge->registers + KB_REG_DOORBELL);
}

static irqreturn_t kb_wire_interrupt(int irq, void *unused)
{
	struct kb_wire_end *end;
	unsigned long flags;

	spin_lock_irqsave(&kb_wires_lock, flags);
	list_for_each_entry(end, &kb_wires, node) {
		bool readable = end->shared && kb_wire_readable_locked(end);

		/* Polling would have paid. */
		if (readable && get_cycles() - end->asked < kb_wire_cycles(kb_wire_spin_us))
			end->poll_us = min(2 * end->poll_us + KB_WIRE_LEAST_POLL_US,
					   READ_ONCE(kb_wire_spin_us));
		if (readable || (end->shared && kb_wire_room_locked(end)))
			wake_up(&end->changed);
	}
	spin_unlock_irqrestore(&kb_wires_lock, flags);
	return IRQ_HANDLED;
}

/* Poll for the answer to what was just written. The caller has set guest_polls. */
static void kb_wire_poll_for_answer(struct kb_wire_end *end)
{
	u64 most = kb_wire_cycles(min(end->poll_us, READ_ONCE(kb_wire_spin_us)));
	unsigned long flags;
	bool answered;

	end->asked = get_cycles();
	do {
		answered = kb_wire_is_readable(end);
		cpu_relax();
	} while (!answered && get_cycles() - end->asked < most && !need_resched() &&
		 !signal_pending(current));
	if (!answered)
		end->poll_us /= 2;
	spin_lock_irqsave(&kb_wires_lock, flags);
	if (end->shared)
		WRITE_ONCE(end->shared->guest_polls, 0);
	/* Pairs with the host's: host_sent, barrier, guest_polls. */
	smp_mb();
	answered = kb_wire_readable_locked(end);
	spin_unlock_irqrestore(&kb_wires_lock, flags);
	if (answered)
		wake_up(&end->changed);
}

/* ---- read, write, poll --------------------------------------------------------------------- */

static int kb_wire_missing(const struct kb_wire_end *end)
{
	return end->gone ? -ENODEV : -ENOTCONN;
}

static bool kb_wire_may_not_wait(const struct kiocb *iocb)
{
	return iocb->ki_filp->f_flags & O_NONBLOCK || iocb->ki_flags & IOCB_NOWAIT;
}

/* Return bytes read, 0 at the end, or an error; -EAGAIN if there is nothing yet. */
static ssize_t kb_wire_take(struct kb_wire_end *end, struct iov_iter *to)
{
	struct kb_wire *shared = end->shared;
	size_t done = 0, wanted;
	s64 bytes;

	lockdep_assert_held(&end->read_lock);
	if (!shared)
		return kb_wire_missing(end);
	bytes = kb_wire_readable_locked(end);
	if (bytes < 0 || bytes > KB_WIRE_RING_BYTES)
		return -EIO;
	if (!bytes)
		return -EAGAIN;
	if (smp_load_acquire(&shared->host_sent) == end->taken)
		return READ_ONCE(shared->host_ended) == KB_WIRE_CLOSED ? 0 : -ECONNRESET;
	wanted = min_t(size_t, iov_iter_count(to), bytes);
	while (done < wanted) {
		size_t at = (end->taken + done) % KB_WIRE_RING_BYTES;
		size_t part = min_t(size_t, wanted - done, KB_WIRE_RING_BYTES - at);
		size_t copied = copy_to_iter(shared->to_guest + at, part, to);

		done += copied;
		if (copied != part)
			break;
	}
	WRITE_ONCE(end->taken, end->taken + done);
	smp_store_release(&shared->guest_taken, end->taken);
	/* Pairs with the host's: host_full, barrier, guest_taken. */
	smp_mb();
	if (READ_ONCE(shared->host_full))
		kb_wire_ring(end);
	return done ? (ssize_t)done : -EFAULT;
}

static ssize_t kb_wire_read(struct kiocb *iocb, struct iov_iter *to)
{
	struct kb_wire_end *end = iocb->ki_filp->private_data;
	bool due = kb_exit_work_is_due();
	ssize_t done;

	if (!iov_iter_count(to))
		return 0;
	kb_recording_pause_current();
	for (;;) {
		mutex_lock(&end->read_lock);
		done = kb_wire_take(end, to);
		mutex_unlock(&end->read_lock);
		if (done != -EAGAIN || kb_wire_may_not_wait(iocb))
			break;
		if (wait_event_interruptible(end->changed, kb_wire_is_readable(end))) {
			done = -ERESTARTSYS;
			break;
		}
	}
	kb_recording_resume_operation(due);
	return done;
}

/* Return bytes written or an error; -EAGAIN if there is no room. Sets guest_polls if any were. */
static ssize_t kb_wire_put(struct kb_wire_end *end, struct iov_iter *from)
{
	struct kb_wire *shared = end->shared;
	size_t done = 0, wanted;
	s64 room;

	lockdep_assert_held(&end->write_lock);
	if (!shared)
		return kb_wire_missing(end);
	if (READ_ONCE(shared->host_ended) == KB_WIRE_RESET)
		return -EPIPE;
	room = (s64)(smp_load_acquire(&shared->host_taken) + KB_WIRE_RING_BYTES - end->sent);
	if (room < 0 || room > KB_WIRE_RING_BYTES)
		return -EIO;
	if (!room)
		return READ_ONCE(shared->host_ended) ? -EPIPE : -EAGAIN;
	wanted = min_t(size_t, iov_iter_count(from), room);
	while (done < wanted) {
		size_t at = (end->sent + done) % KB_WIRE_RING_BYTES;
		size_t part = min_t(size_t, wanted - done, KB_WIRE_RING_BYTES - at);
		size_t copied = copy_from_iter(shared->to_host + at, part, from);

		done += copied;
		if (copied != part)
			break;
	}
	if (!done)
		return -EFAULT;
	WRITE_ONCE(shared->guest_polls, !!end->poll_us);
	WRITE_ONCE(end->sent, end->sent + done);
	/* Pairs with the host's load of it. */
	smp_store_release(&shared->guest_sent, end->sent);
	smp_mb();
	kb_wire_ring(end);
	return done;
}

static ssize_t kb_wire_write(struct kiocb *iocb, struct iov_iter *from)
{
	struct kb_wire_end *end = iocb->ki_filp->private_data;
	bool due = kb_exit_work_is_due();
	ssize_t done = 0, part = 0;

	kb_recording_pause_current();
	while (iov_iter_count(from)) {
		mutex_lock(&end->write_lock);
		part = kb_wire_put(end, from);
		mutex_unlock(&end->write_lock);
		if (part > 0) {
			done += part;
			continue;
		}
		if (part != -EAGAIN || kb_wire_may_not_wait(iocb))
			break;
		if (wait_event_interruptible(end->changed, kb_wire_is_writable(end))) {
			part = -ERESTARTSYS;
			break;
		}
	}
	if (done)
		kb_wire_poll_for_answer(end);
	kb_recording_resume_operation(due);
	return done ? done : min_t(ssize_t, part, 0);
}

static __poll_t kb_wire_poll(struct file *file, poll_table *table)
{
	struct kb_wire_end *end = file->private_data;
	__poll_t events = 0;
	bool gone;

	poll_wait(file, &end->changed, table);
	if (kb_wire_is_readable(end))
		events |= EPOLLIN | EPOLLRDNORM;
	if (kb_wire_is_writable(end))
		events |= EPOLLOUT | EPOLLWRNORM;
	spin_lock_irq(&kb_wires_lock);
	gone = !end->shared || READ_ONCE(end->shared->host_ended) == KB_WIRE_RESET;
	spin_unlock_irq(&kb_wires_lock);
	return gone ? events | EPOLLERR | EPOLLHUP : events;
}

/* ---- open, connect, close ------------------------------------------------------------------ */

static int kb_wire_open(struct inode *inode, struct file *file)
{
	struct kb_wire_end *end = kzalloc(sizeof(*end), GFP_KERNEL);

	if (!end)
		return -ENOMEM;
	/* Valid, because removal deletes the file of this device first. */
	end->inst = kb_instance_new(kb_active, NULL);
	if (IS_ERR(end->inst)) {
		int err = PTR_ERR(end->inst);

		kfree(end);
		return err;
	}
	mutex_init(&end->read_lock);
	mutex_init(&end->write_lock);
	init_waitqueue_head(&end->changed);
	end->poll_us = READ_ONCE(kb_wire_spin_us);
	mutex_lock(&kb_wires_mutex);
	spin_lock_irq(&kb_wires_lock);
	list_add(&end->node, &kb_wires);
	spin_unlock_irq(&kb_wires_lock);
	mutex_unlock(&kb_wires_mutex);
	file->private_data = end;
	return stream_open(inode, file);
}

/* Change the connection. The caller unmaps the old one, which nobody uses any more. */
static struct kb_wire *kb_wire_set(struct kb_wire_end *end, struct kb_wire *shared, bool gone)
{
	struct kb_wire *old;

	lockdep_assert_held(&kb_wires_mutex);
	mutex_lock(&end->read_lock);
	mutex_lock(&end->write_lock);
	spin_lock_irq(&kb_wires_lock);
	old = end->shared;
	end->shared = shared;
	end->gone = gone;
	spin_unlock_irq(&kb_wires_lock);
	mutex_unlock(&end->write_lock);
	mutex_unlock(&end->read_lock);
	return old;
}

static int kb_wire_connect_locked(struct kb_wire_end *end, unsigned long port)
{
	struct kb_instance *inst = end->inst;
	const struct kb_bridge *bridge = inst->bridge;
	struct kb_wire *shared;
	u64 offset;
	int err;

	lockdep_assert_held(&inst->lock);
	if (!kb_instance_settle(inst))
		return inst->detached ? -ENODEV : -EIO;
	err = kb_request(inst, KB_OP_WIRE, 0, port, 0, 0);
	if (err)
		return err;
	offset = READ_ONCE(bridge->responses[inst->slot].area_offset);
	if (offset < KB_AREAS_OFFSET || !PAGE_ALIGNED(offset) || offset > bridge->region_bytes ||
	    sizeof(*shared) > bridge->region_bytes - offset)
		return -EIO;
	shared = memremap(bridge->region_start + offset, sizeof(*shared), MEMREMAP_WB);
	if (!shared)
		return -ENOMEM;
	kb_wire_set(end, shared, false);
	return 0;
}

static long kb_wire_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kb_wire_end *end = file->private_data;
	long err;

	if (cmd != KCOV_BRIDGE_WIRE)
		return -ENOTTY;
	mutex_lock(&kb_wires_mutex);
	if (end->gone) {
		err = -ENODEV;
	} else if (end->shared) {
		err = -EISCONN;
	} else if (!end->inst->bridge->wires) {
		err = -EOPNOTSUPP;
	} else {
		kb_instance_lock(end->inst);
		err = kb_wire_connect_locked(end, arg);
		mutex_unlock(&end->inst->lock);
	}
	mutex_unlock(&kb_wires_mutex);
	return err;
}

static int kb_wire_release(struct inode *inode, struct file *file)
{
	struct kb_wire_end *end = file->private_data;
	struct kb_wire *shared;

	mutex_lock(&kb_wires_mutex);
	spin_lock_irq(&kb_wires_lock);
	list_del(&end->node);
	spin_unlock_irq(&kb_wires_lock);
	shared = kb_wire_set(end, NULL, true);
	mutex_unlock(&kb_wires_mutex);
	if (shared)
		memunmap(shared);
	kref_put(&end->inst->ref, kb_instance_free);
	mutex_destroy(&end->read_lock);
	mutex_destroy(&end->write_lock);
	kfree(end);
	return 0;
}

static const struct file_operations kb_wire_fops = {
	.owner		= THIS_MODULE,
	.open		= kb_wire_open,
	.release	= kb_wire_release,
	.read_iter	= kb_wire_read,
	.write_iter	= kb_wire_write,
	.poll		= kb_wire_poll,
	.unlocked_ioctl	= kb_wire_ioctl,
	.compat_ioctl	= kb_wire_ioctl,
};

static struct miscdevice kb_wire_misc = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "kcov_wire",
	.mode	= 0600,
	.fops	= &kb_wire_fops,
};

/* ---- the device ---------------------------------------------------------------------------- */

/**
 * kb_wires_start() - offer wires
 * @bridge: the device, which is kb_active
 * @pdev: its PCI device, enabled
 *
 * Without interrupts there are none, and the device is whole in all else.
 *
 * Return: 0 or an error.
 */
int kb_wires_start(struct kb_bridge *bridge, struct pci_dev *pdev)
{
	int err;

	pci_set_master(pdev);
	err = pci_alloc_irq_vectors(pdev, KB_WIRE_VECTOR + 1, KB_WIRE_VECTOR + 1, PCI_IRQ_MSIX);
	if (err > 0)
		err = devm_request_irq(&pdev->dev, pci_irq_vector(pdev, KB_WIRE_VECTOR),
				       kb_wire_interrupt, 0, KBUILD_MODNAME, bridge);
	if (err)
		dev_info(&pdev->dev, "no wires, because there are no interrupts: %d\n", err);
	bridge->wires = !err;
	return misc_register(&kb_wire_misc);
}

/**
 * kb_wires_stop() - end all connections
 *
 * Waits for copies in progress; later operations fail with ENODEV.
 */
void kb_wires_stop(void)
{
	struct kb_wire_end *end;

	/* From here on the file cannot be opened. */
	misc_deregister(&kb_wire_misc);
	mutex_lock(&kb_wires_mutex);
	list_for_each_entry(end, &kb_wires, node) {
		struct kb_wire *shared = kb_wire_set(end, NULL, true);

		if (shared)
			memunmap(shared);
		wake_up_all(&end->changed);
	}
	mutex_unlock(&kb_wires_mutex);
}
