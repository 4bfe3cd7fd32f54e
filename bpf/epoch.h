/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The epoch: one number that invalidates all lines. */
#ifndef UDPLB_EPOCH_H
#define UDPLB_EPOCH_H

/* Reads the epoch from memory each time. */
static __always_inline __u32 current_epoch(void)
{
	return *(const volatile __u32 *)&gate.epoch;
}

/* Returns true while what was remembered in an epoch may be used, until a time in jiffies. */
static __always_inline bool is_fresh(__u32 epoch, __u32 until)
{
	return epoch == current_epoch() && (__s32)(until - (__u32)bpf_jiffies64()) > 0;
}

/* Invalidates all lines. Called after a change of what the slow path reads. */
static __always_inline void next_epoch(void)
{
	__sync_fetch_and_add(&gate.epoch, 1);
}

#endif
