/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Recognises plain datagrams, which the fast path may send, and rewrites them. */
#ifndef UDPLB_PLAIN_H
#define UDPLB_PLAIN_H

/* Result of the fast path for a packet that the slow path processes. */
#define ACTION_SLOW 102

/* Result for a packet of which clones are sent. */
#define ACTION_COPY 103

/* Result of run() for a packet that slowpath_run() processes. */
#define ACTION_RARE 104

/* Result for an ICMP packet, where errors may be about answers of upstreams. */
#define ACTION_ERROR 105

/* Returns offsets and flags of a datagram without IPv4 options or IPv6 extension headers. */
static __always_inline __u32 plain_packed(bool ipv6)
{
	if (ipv6)
		return pkt_pack(PKT_F_IPV6, 0, sizeof(struct ethhdr) + sizeof(struct ipv6hdr));
	return pkt_pack(0, 0, sizeof(struct ethhdr) + sizeof(struct iphdr));
}

/*
 * Points `pkt` at the headers of a datagram without IPv4 options or IPv6 extension headers, from the first
 * byte of its frame on. Returns false if they do not lie before `end`.
 */
static __always_inline bool locate_headers(void *frame, const void *end, struct pkt *pkt, const bool ipv6)
{
	void *ip = frame + sizeof(struct ethhdr);

	barrier_var(ip); /* one base for all headers, which takes one register */
	pkt->ip = ip;
	pkt->eth = ip - sizeof(struct ethhdr);
	pkt->is_ipv6 = ipv6;
	pkt->has_udp = true;
	pkt->packed = plain_packed(ipv6);
	pkt->udp = ipv6 ? (void *)(pkt->ip6 + 1) : (void *)(pkt->ip + 1);
	return (void *)(pkt->udp + 1) <= end;
}

/* Points `pkt` at the headers in the skb's linear part, as locate_headers(). */
static __always_inline bool locate_plain(struct __sk_buff *skb, struct pkt *pkt, const bool ipv6)
{
	return locate_headers((void *)(long)skb->data, data_end(skb), pkt, ipv6);
}

/*
 * Returns true for source addresses that need none of the checks of check_source(): all that are not martian,
 * and some that are not either but rare.
 */
static __always_inline bool is_usual_source4(const struct iphdr *ip)
{
	__u32 source = bpf_ntohl(ip->saddr);

	return source - 0x01000000 < 0xdf000000 && source >> 24 != 127 && source >> 16 != 0xa9fe &&
	       ip->saddr != ip->daddr;
}

static __always_inline bool is_usual_source6(const struct ipv6hdr *ip6)
{
	const __be32 *source = ip6->saddr.in6_u.u6_addr32;

	return (source[0] & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000) && source[0] | source[1] &&
	       !is_link_local(source) && !is_same_address(source, ip6->daddr.in6_u.u6_addr32);
}

/*
 * Returns true if the headers of a packet, in a frame of `bytes` bytes, are those of one that is forwarded,
 * whatever its rule says. The opposite says nothing, here and below: the slow path decides.
 */
static __always_inline bool is_sound(__u32 bytes, const struct pkt *pkt, const bool ipv6)
{
	return !is_ttl_expired(pkt) && has_valid_lengths(bytes, pkt) &&
	       (ipv6 ? pkt->udp->check : is_ipv4_checksum_valid(pkt->ip, 0));
}

/* Returns true if admit() would admit the packet, in a frame for this host, and its TTL lasts. */
static __always_inline bool is_usual(__u32 bytes, const struct pkt *pkt, const bool ipv6)
{
	return is_sound(bytes, pkt, ipv6) && !is_suspect(pkt) &&
	       (ipv6 ? is_usual_source6(pkt->ip6) : is_usual_source4(pkt->ip));
}

/* Returns true for a packet at tc that is whole and for this host, if that is in the VLAN of its tag. */
static __always_inline bool is_whole_in_vlan(struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_HOST && !skb->gso_size;
}

/* Returns true for a packet at tc that is whole and for this host. */
static __always_inline bool is_whole(struct __sk_buff *skb)
{
	return is_whole_in_vlan(skb) && (!skb->vlan_present || is_for_us_tagged(skb, 0));
}

/* Returns true for a usual packet that is whole and for this host, if that is in the VLAN of its tag. */
static __always_inline bool is_plain_in_vlan(struct __sk_buff *skb, const struct pkt *pkt, const bool ipv6)
{
	return is_whole_in_vlan(skb) && is_usual(skb->len, pkt, ipv6);
}

/* Returns true for a usual packet that is whole and for this host. */
static __always_inline bool is_plain(struct __sk_buff *skb, const struct pkt *pkt, const bool ipv6)
{
	return is_whole(skb) && is_usual(skb->len, pkt, ipv6);
}

/*
 * Stores the new headers for the upstream of a line, and returns the new destination. Returns NULL if only
 * the slow path can tell whether they are those of a packet that no router forwards.
 */
static __always_inline const __be32 *fill_plain_rewrite(const struct pkt *pkt, const struct line *line,
							__u32 index, const bool ipv6, struct rewrite *rw)
{
	const struct upstream *upstream;

	rw->port = line->port;
	rw->source_port = 0;
	rw->identification = 0;
	if (!ipv6) {
		rw->source[0] = line->source4;
		if (line->source == SOURCE_PRESERVE)
			rw->source[0] = pkt->ip->saddr;
		else if (line->source == SOURCE_VIP)
			rw->source[0] = pkt->ip->daddr;
		barrier_var(rw->source[0]);
		return rw->source[0] != line->destination ? &line->destination : NULL;
	}
	upstream = bpf_map_lookup_elem(&upstreams, &index);
	if (!upstream)
		return NULL;
	if (line->source == SOURCE_PRESERVE)
		copy_address(rw->source, &pkt->ip6->saddr, true);
	else if (line->source == SOURCE_VIP)
		copy_address(rw->source, &pkt->ip6->daddr, true);
	else
		copy_address(rw->source, line->source6, true);
	return is_same_address(rw->source, upstream->address) ? NULL : upstream->address;
}

/* Returns true if the line of an upstream is valid for the packet. */
static __always_inline bool serves(const struct line *line, const struct pkt *pkt)
{
	return is_line_valid(line, total_length(pkt));
}

/*
 * Pops the tag that the skb holds, if it holds one, and points `pkt` at the headers again. Returns false if
 * the packet can no longer be processed.
 */
static __always_inline bool pop_plain(struct __sk_buff *skb, struct pkt *pkt, const bool ipv6)
{
	return !skb->vlan_present || (!bpf_skb_vlan_pop(skb) && locate_plain(skb, pkt, ipv6));
}

/* Redirects a packet by bpf_redirect(); the compiler is told that its action is none of ours. */
static __always_inline int redirect_plain(__u32 ifindex)
{
	int action = bpf_redirect(ifindex, 0);

	__builtin_assume(action < ACTION_SLOW);
	return action;
}

/* Rewrites a packet for a next hop. Returns what was added to skb->csum. */
static __always_inline __u32 rewrite_plain(struct __sk_buff *skb, const struct pkt *pkt,
					   const struct rewrite *rw, const __be32 *destination,
					   const void *macs)
{
	__u32 delta;

	copy_macs(pkt->eth, macs);
	if (likely(!has_csum_offload(skb))) {
		rewrite_headers(skb, pkt, CSUM_FULL, rw, destination);
		return 0;
	}
	delta = rewrite_headers(skb, pkt, checksum_state(skb, pkt), rw, destination);
	if (delta)
		bpf_csum_update(skb, delta);
	return delta;
}

/* The rewritten fields of a plain IPv4 packet as they arrived, in few words, each of which takes stack. */
struct saved4 {
	__u64 macs;
	__u64 ttl_to_source;
	__u64 destination_and_ports;
	__u64 rest; /* of the MAC addresses, and above that the UDP checksum */
};

static __always_inline void save_plain4(const struct pkt *pkt, struct saved4 *saved)
{
	saved->macs = *(const __u64 *)pkt->eth;
	saved->ttl_to_source = *(__u64 *)&pkt->ip->ttl;
	saved->destination_and_ports = *(__u64 *)&pkt->ip->daddr;
	saved->rest = *(const __u32 *)((void *)pkt->eth + 8) | (__u64)pkt->udp->check << 32;
	barrier_var(saved->rest); /* else the compiler keeps both parts */
}

static __always_inline void restore_plain4(const struct pkt *pkt, const struct saved4 *saved)
{
	*(__u64 *)pkt->eth = saved->macs;
	*(__u32 *)((void *)pkt->eth + 8) = saved->rest;
	*(__u64 *)&pkt->ip->ttl = saved->ttl_to_source;
	*(__u64 *)&pkt->ip->daddr = saved->destination_and_ports;
	pkt->udp->check = saved->rest >> 32;
}

/* Counts a plain packet of which the upstream with this index got neither a clone nor the packet. */
static __always_inline void count_not_copied(struct __sk_buff *skb, __u32 index)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);

	if (upstream)
		count_verdict(skb, PKT_UNKNOWN, 0, upstream->id, VERDICT_CLONE_FAILED);
}

#endif
