/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The MTU of the path to an upstream, where it is less than that of the way out. */
#ifndef UDPLB_PMTU_H
#define UDPLB_PMTU_H

/* Floors of a path's MTU: net.ipv4.route.min_pmtu, and RFC 8200, section 5. */
#define LEAST_MTU_IPV4 552
#define LEAST_MTU_IPV6 1280

#define LEARNED_SECONDS 600 /* net.ipv4.route.mtu_expires */
#define ASKED_SECONDS 1	    /* the kernel, which has its own expiry */

static __always_inline __u32 least_mtu(bool ipv6)
{
	return ipv6 ? LEAST_MTU_IPV6 : LEAST_MTU_IPV4;
}

/* Returns true while that time is to come. */
static __always_inline bool is_ahead(__u64 until)
{
	return until > bpf_jiffies64();
}

/* Notes the MTU of a path for so many seconds, unless a lower one is known. */
static __always_inline void note_mtu(const struct key_address *destination, __u32 mtu, __u32 seconds)
{
	struct path_mtu noted = {.mtu = mtu, .until = bpf_jiffies64() + seconds * features.ticks_per_second};
	const struct path_mtu *known = bpf_map_lookup_elem(&path_mtus, destination);
	struct tickets *tickets = get_tickets();

	if (!tickets || (known && known->mtu < mtu && is_ahead(known->until)))
		return;
	if (noted.until > tickets->path_mtus_until)
		tickets->path_mtus_until = noted.until;
	bpf_map_update_elem(&path_mtus, destination, &noted, BPF_ANY);
}

/* Returns true while the MTU of some path is noted. */
static __always_inline bool is_any_noted(void)
{
	const struct tickets *tickets = get_tickets();

	return tickets && is_ahead(tickets->path_mtus_until);
}

#endif
