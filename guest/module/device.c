// SPDX-License-Identifier: GPL-2.0
/*
 * The kcov device's file: open, ioctl, mmap and close, and open descriptors after the device's
 * removal.
 *
 * The host decides about each operation: the module forwards it, and the caller gets the errno that
 * comes back. The errno is EIO if the host does not answer, and ENODEV once the device is gone.
 */

#include <linux/err.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "kcov_bridge.h"

/* ---- the life of an instance --------------------------------------------------------------- */

/**
 * kb_instance_free() - free an instance after its last reference
 * @ref: of the instance
 *
 * Process context, may sleep.
 */
void kb_instance_free(struct kref *ref)
{
	struct kb_instance *inst = container_of(ref, struct kb_instance, ref);

	mutex_lock(&inst->lock);
	if (inst->seq && kb_instance_settle(inst))
		kb_request(inst, KB_OP_RELEASE, 0, 0, 0, 0);
	mutex_unlock(&inst->lock);
	kb_slot_release(inst);
	mutex_destroy(&inst->lock);
	free_page(inst->blank_page);
	kb_bridge_put(inst->bridge);
	kfree_rcu(inst, rcu);
	module_put(THIS_MODULE);
}

/**
 * kb_instance_new() - make an instance with a slot and one reference
 * @bridge: the device; the caller holds a reference to it, or it cannot be removed now
 * @mapping: of the instance's file, or NULL
 *
 * Return: the instance, or an error pointer.
 */
struct kb_instance *kb_instance_new(struct kb_bridge *bridge, struct address_space *mapping)
{
	struct kb_instance *inst;
	int err;

	inst = kzalloc(sizeof(*inst), GFP_KERNEL);
	if (!inst)
		return ERR_PTR(-ENOMEM);
	kref_init(&inst->ref);
	kb_instance_init(inst, bridge);
	inst->mapping = mapping;
	err = kb_slot_acquire(inst);
	if (err) {
		kfree(inst);
		return ERR_PTR(err);
	}
	kref_get(&bridge->ref);
	/* An owner holds the instance after the last close. */
	__module_get(THIS_MODULE);
	return inst;
}

static int kb_open(struct inode *inode, struct file *file)
{
	/* Valid, because removal deletes the files of this device first. */
	struct kb_instance *inst = kb_instance_new(kb_active, file->f_mapping);

	if (IS_ERR(inst))
		return PTR_ERR(inst);
	file->private_data = inst;
	return nonseekable_open(inode, file);
}

/* The last descriptor was closed; mappings may remain. The host decides whether the owner ends. */
static void kb_instance_last_close(struct kb_instance *inst)
{
	struct kb_owner *owner;

	kb_recording_pause_current();
	kb_instance_lock(inst);
	owner = inst->owner;
	if (owner && (current->flags & PF_EXITING) && owner->task == current)
		kb_owner_end_exiting(inst);
	else if (owner && kb_instance_settle(inst) &&
		 !kb_request(inst, KB_OP_CLOSE, owner->id, 0, READ_ONCE(owner->unreported_returns),
			     0))
		kb_owner_end(inst);
	mutex_unlock(&inst->lock);
	kb_recording_resume_current();
}

/* A descriptor is closed. */
static int kb_flush(struct file *file, fl_owner_t id)
{
	struct kb_instance *inst = file->private_data;

	/*
	 * Each mapping holds the file, a little longer than it is counted. Any other holder is a
	 * descriptor or may become one.
	 */
	if (file_count(file) - atomic_read(&inst->mappings) <= 1)
		kb_instance_last_close(inst);
	return 0;
}

static int kb_release(struct inode *inode, struct file *file)
{
	struct kb_instance *inst = file->private_data;

	/* The last one may have been a descriptor in a message that no process received. */
	kb_instance_last_close(inst);
	mutex_lock(&inst->lock);
	inst->mapping = NULL;
	mutex_unlock(&inst->lock);
	kref_put(&inst->ref, kb_instance_free);
	return 0;
}

/* Return the error for a request that could not be sent. */
static int kb_instance_error(const struct kb_instance *inst)
{
	lockdep_assert_held(&inst->lock);
	return inst->detached ? -ENODEV : -EIO;
}

/* ---- ioctl --------------------------------------------------------------------------------- */

/* The argument of KCOV_REMOTE_ENABLE, as far as the module could read it. */
struct kb_remote {
	u32 mode;
	u32 area_size;
	/* As the user gave it, perhaps more than the handles below; ~0 if it could not be read. */
	u64 count;
	u64 common_handle;
	u64 handles[KCOV_REMOTE_MAX_HANDLES];
};

/* Read the argument. Called without locks, because a page fault takes mmap_lock. */
static struct kb_remote *kb_remote_read(const struct kcov_remote_arg __user *user)
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

/* Pass the argument to the host, which checks it. */
static int kb_remote_enable(struct kb_instance *inst, const struct kb_remote *remote)
{
	struct kb_bridge *bridge = inst->bridge;
	int err;

	mutex_lock(&bridge->payload_lock);
	WRITE_ONCE(bridge->payload_inst, inst);
	if (remote->count <= KCOV_REMOTE_MAX_HANDLES)
		memcpy(bridge->payload, remote->handles, remote->count * sizeof(u64));
	err = kb_owner_start(inst, KB_OP_REMOTE, remote->mode | (u64)remote->area_size << 32,
			     remote->count, remote->common_handle);
	mutex_unlock(&bridge->payload_lock);
	return err;
}

static int kb_disable(struct kb_instance *inst, unsigned long arg)
{
	const struct kb_owner *owner = inst->owner;
	u64 returns = owner && owner->task == current ? owner->unreported_returns : 0;
	int err;

	err = kb_request(inst, KB_OP_DISABLE, kb_current_id(), arg, returns, 0);
	if (!err)
		kb_owner_end(inst);
	return err;
}

/* @remote is the argument of KCOV_REMOTE_ENABLE. The instance must be settled. */
static long kb_ioctl_locked(struct kb_instance *inst, unsigned int cmd, unsigned long arg,
			    const struct kb_remote *remote)
{
	lockdep_assert_held(&inst->lock);
	switch (cmd) {
	case KCOV_INIT_TRACE:
		return kb_request(inst, KB_OP_INIT, 0, arg, 0, 0);
	case KCOV_BRIDGE_LANE:
		return kb_request(inst, KB_OP_LANE, 0, arg, 0, 0);
	case KCOV_ENABLE:
		return kb_owner_start(inst, KB_OP_ENABLE, arg, (unsigned long)current, 0);
	case KCOV_UNIQUE_ENABLE:
		return kb_owner_start(inst, KB_OP_UNIQUE, arg, (unsigned long)current, 0);
	case KCOV_REMOTE_ENABLE:
		return kb_remote_enable(inst, remote);
	case KCOV_BRIDGE_STREAM:
		return kb_owner_start(inst, KB_OP_STREAM, arg & ~KCOV_BRIDGE_FOLLOW,
				      (unsigned long)current, !!(arg & KCOV_BRIDGE_FOLLOW));
	case KCOV_RESET_TRACE:
		return kb_request(inst, KB_OP_RESET, kb_current_id(), arg, 0, 0);
	case KCOV_DISABLE:
		return kb_disable(inst, arg);
	default:
		return -ENOTTY;
	}
}

static long kb_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kb_instance *inst = file->private_data;
	struct kb_remote *remote = NULL;
	bool due;
	long err;

	if (cmd == KCOV_REMOTE_ENABLE) {
		remote = kb_remote_read((struct kcov_remote_arg __user *)arg);
		if (!remote)
			return -ENOMEM;
	}
	due = kb_exit_work_is_due();
	kb_recording_pause_current();
	kb_instance_lock(inst);
	if (kb_instance_settle(inst))
		err = kb_ioctl_locked(inst, cmd, arg, remote);
	else
		err = kb_instance_error(inst);
	mutex_unlock(&inst->lock);
	kfree(remote);
	kb_recording_resume_operation(due);
	return err;
}

/* ---- mmap ---------------------------------------------------------------------------------- */

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

/*
 * mmap fills mappings completely, so a fault means that one was removed, mostly with the device. A
 * program that reads its area must not die of that, so it finds one blank page everywhere. Private
 * mappings get SIGBUS, because the kernel accepts no bare page frame there.
 */
static vm_fault_t kb_vma_fault(struct vm_fault *vmf)
{
	struct kb_instance *inst = vmf->vma->vm_private_data;
	vm_fault_t result = 0;
	unsigned long frame = vmf->pgoff;

	if (!(vmf->vma->vm_flags & VM_SHARED) && vmf->vma->vm_flags & VM_MAYWRITE)
		return VM_FAULT_SIGBUS;
	mutex_lock(&inst->lock);
	if (inst->detached) {
		if (!inst->blank_page)
			inst->blank_page = get_zeroed_page(GFP_KERNEL);
		frame = virt_to_phys((void *)inst->blank_page) >> PAGE_SHIFT;
		if (!inst->blank_page)
			result = VM_FAULT_OOM;
	}
	/* Under the lock, so that removal finds the page. */
	if (!result)
		result = vmf_insert_pfn(vmf->vma, vmf->address, frame);
	mutex_unlock(&inst->lock);
	return result;
}

static const struct vm_operations_struct kb_vm_ops = {
	.open	= kb_vma_open,
	.close	= kb_vma_close,
	.fault	= kb_vma_fault,
	/* For ptrace and /proc/PID/mem. */
	.access	= generic_access_phys,
};

static void kb_instance_unmap(struct kb_instance *inst)
{
	lockdep_assert_held(&inst->lock);
	/* Pages that a program wrote in private mappings are its own, and stay. */
	if (inst->mapping && inst->map_end)
		unmap_mapping_range(inst->mapping, (loff_t)inst->map_start << PAGE_SHIFT,
				    (loff_t)(inst->map_end - inst->map_start) << PAGE_SHIFT, 0);
}

/* A check of a new mapping, which removal cannot find before the kernel has inserted it. */
struct kb_mapping_check {
	struct callback_head work;
	struct kb_instance *inst;
};

static void kb_mapping_check_work(struct callback_head *head)
{
	struct kb_mapping_check *check = container_of(head, struct kb_mapping_check, work);
	struct kb_instance *inst = check->inst;

	mutex_lock(&inst->lock);
	if (inst->detached)
		kb_instance_unmap(inst);
	mutex_unlock(&inst->lock);
	kfree(check);
	kref_put(&inst->ref, kb_instance_free);
}

/* Check a mapping again once mmap has inserted it. */
static int kb_mapping_check_queue(struct kb_instance *inst)
{
	struct kb_mapping_check *check = kmalloc(sizeof(*check), GFP_KERNEL);
	int err;

	if (!check)
		return -ENOMEM;
	check->inst = inst;
	init_task_work(&check->work, kb_mapping_check_work);
	kref_get(&inst->ref);
	err = kb_task_work_add(current, &check->work, TWA_RESUME);
	if (err) {
		kref_put(&inst->ref, kb_instance_free);
		kfree(check);
	}
	return err;
}

/* Ask the host for the area's offset, and map the area. */
static int kb_mmap_locked(struct kb_instance *inst, struct vm_area_struct *vma)
{
	unsigned long length = vma->vm_end - vma->vm_start;
	const struct kb_bridge *bridge = inst->bridge;
	unsigned long frame;
	u64 offset;
	int err;

	lockdep_assert_held(&inst->lock);
	if (!kb_instance_settle(inst))
		return kb_instance_error(inst);
	err = kb_request(inst, KB_OP_MAP, 0, length, vma->vm_pgoff, atomic_read(&inst->mappings));
	if (err)
		return err;
	offset = READ_ONCE(bridge->responses[inst->slot].area_offset);
	if (offset < KB_AREAS_OFFSET || !PAGE_ALIGNED(offset) || offset > bridge->region_bytes ||
	    length > bridge->region_bytes - offset)
		return -EIO;
	err = kb_mapping_check_queue(inst);
	if (err)
		return err;
	frame = (bridge->region_start + offset) >> PAGE_SHIFT;
	err = remap_pfn_range(vma, vma->vm_start, frame, length, vma->vm_page_prot);
	if (err)
		return err;
	/* As remap_pfn_range() does for private mappings, so that the areas of a region differ. */
	vma->vm_pgoff = frame;
	inst->map_start = inst->map_end ? min(inst->map_start, frame) : frame;
	inst->map_end = max(inst->map_end, frame + (length >> PAGE_SHIFT));
	vma->vm_private_data = inst;
	vma->vm_ops = &kb_vm_ops;
	atomic_inc(&inst->mappings);
	return 0;
}

static int kb_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kb_instance *inst = file->private_data;
	bool due;
	int err;

	due = kb_exit_work_is_due();
	kb_recording_pause_current();
	kb_instance_lock(inst);
	err = kb_mmap_locked(inst, vma);
	mutex_unlock(&inst->lock);
	kb_recording_resume_operation(due);
	return err;
}

const struct file_operations kb_device_fops = {
	.owner		= THIS_MODULE,
	.open		= kb_open,
	.flush		= kb_flush,
	.release	= kb_release,
	.unlocked_ioctl	= kb_ioctl,
	.compat_ioctl	= kb_ioctl,
	.mmap		= kb_mmap,
};

/* ---- removal of the device ----------------------------------------------------------------- */

/* End the instance for the host, and clear its references to the region. */
static void kb_instance_detach(struct kb_instance *inst)
{
	kb_instance_lock(inst);
	kb_instance_unmap(inst);
	if (inst->seq && kb_instance_settle(inst))
		kb_request(inst, KB_OP_RELEASE, 0, 0, 0, 0);
	kb_owner_end(inst);
	inst->unanswered = 0;
	inst->deferred_exit = 0;
	inst->detached = true;
	WRITE_ONCE(inst->hidden, &inst->nowhere);
	mutex_unlock(&inst->lock);
}

/**
 * kb_instances_detach() - detach all instances from the device
 * @bridge: the device; its files are gone
 *
 * Current requests end first. Later ones fail with ENODEV.
 *
 * Return: how many there were.
 */
unsigned int kb_instances_detach(struct kb_bridge *bridge)
{
	unsigned int slot, detached = 0;

	/* From here on no instance is made, nor for a task that is followed. */
	spin_lock(&bridge->slots_lock);
	bridge->removed = true;
	spin_unlock(&bridge->slots_lock);
	for (slot = 0; slot < KB_SLOTS; slot++) {
		struct kb_instance *inst;
		bool ending;

		spin_lock(&bridge->slots_lock);
		inst = bridge->instances[slot];
		ending = inst && !kref_get_unless_zero(&inst->ref);
		spin_unlock(&bridge->slots_lock);
		if (!inst)
			continue;
		if (ending) {
			/* kb_instance_free() may wait for the host and read its answer. */
			wait_event(bridge->slot_released, !READ_ONCE(bridge->instances[slot]));
			continue;
		}
		kb_instance_detach(inst);
		kref_put(&inst->ref, kb_instance_free);
		detached++;
	}
	/* Wait for writes through the old pointer to a hidden flag. */
	synchronize_rcu();
	return detached;
}
