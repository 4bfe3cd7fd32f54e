/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Records path MTUs to upstreams that are lower than the MTU of the next hop. */
#ifndef UDPLB_PMTU_H
#define UDPLB_PMTU_H

/* Lowest path MTUs that are believed: net.ipv4.route.min_pmtu, and RFC 8200, section 5. */
#define MIN_PMTU_IPV4 552
#define MIN_PMTU_IPV6 1280

#define PMTU_EXPIRY_SECONDS 600 /* as net.ipv4.route.mtu_expires */
#define PMTU_POLL_SECONDS 1	/* between queries of the kernel, whose entries have their own expiry */

static __always_inline __u32 min_pmtu(bool ipv6)
{
	return ipv6 ? MIN_PMTU_IPV6 : MIN_PMTU_IPV4;
}

/* Returns true if a time in jiffies lies in the future. */
static __always_inline bool is_future(__u64 until)
{
	return until > bpf_jiffies64();
}

/* Records a path MTU for so many seconds, unless a lower one is recorded. */
static __always_inline void update_pmtu(const struct key_address *destination, __u32 mtu, __u32 seconds)
{
	struct path_mtu update = {.mtu = mtu, .until = bpf_jiffies64() + seconds * features.ticks_per_second};
	const struct path_mtu *recorded = bpf_map_lookup_elem(&path_mtus, destination);
	struct sequences *sequences = get_sequences();
	bool is_known;

	if (!sequences || (recorded && recorded->mtu < mtu && is_future(recorded->until)))
		return;
	is_known = recorded && recorded->mtu == mtu && is_future(recorded->until);
	if (update.until > sequences->path_mtus_until)
		sequences->path_mtus_until = update.until;
	bpf_map_update_elem(&path_mtus, destination, &update, BPF_ANY);
	if (!is_known)
		next_epoch();
}

/* Returns true while any path MTU is recorded. */
static __always_inline bool has_pmtus(void)
{
	const struct sequences *sequences = get_sequences();

	return sequences && is_future(sequences->path_mtus_until);
}

#endif
