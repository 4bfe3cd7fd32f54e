/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The MTU of the path to an upstream, where it is less than that of the way out. */
#ifndef UDPLB_PMTU_H
#define UDPLB_PMTU_H

/* Floors of a path's MTU: net.ipv4.route.min_pmtu, and RFC 8200, section 5. */
#define MIN_PMTU_IPV4 552
#define MIN_PMTU_IPV6 1280

#define PMTU_EXPIRY_SECONDS 600 /* net.ipv4.route.mtu_expires */
#define PMTU_POLL_SECONDS 1	/* the kernel, which has its own expiry */

static __always_inline __u32 min_pmtu(bool ipv6)
{
	return ipv6 ? MIN_PMTU_IPV6 : MIN_PMTU_IPV4;
}

/* Returns true while that time is to come. */
static __always_inline bool is_future(__u64 until)
{
	return until > bpf_jiffies64();
}

/* Notes the MTU of a path for so many seconds, unless a lower one is known. */
static __always_inline void update_pmtu(const struct key_address *destination, __u32 mtu, __u32 seconds)
{
	struct path_mtu noted = {.mtu = mtu, .until = bpf_jiffies64() + seconds * features.ticks_per_second};
	const struct path_mtu *known = bpf_map_lookup_elem(&path_mtus, destination);
	struct sequences *sequences = get_sequences();

	if (!sequences || (known && known->mtu < mtu && is_future(known->until)))
		return;
	if (noted.until > sequences->path_mtus_until)
		sequences->path_mtus_until = noted.until;
	bpf_map_update_elem(&path_mtus, destination, &noted, BPF_ANY);
}

/* Returns true while the MTU of some path is noted. */
static __always_inline bool has_pmtus(void)
{
	const struct sequences *sequences = get_sequences();

	return sequences && is_future(sequences->path_mtus_until);
}

#endif
