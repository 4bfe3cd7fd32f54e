/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The fast path of packets that keep their destination: as they are but for the TTL, or in outer headers. */
#ifndef UDPLB_DIRECT_H
#define UDPLB_DIRECT_H

/* Lowers the TTL of a packet by one. Returns what this adds to skb->csum. */
static __always_inline __u64 lower_ttl(const struct pkt *pkt, const bool ipv6)
{
	if (ipv6) {
		pkt->ip6->hop_limit--;
		return bpf_htons(0xfffe);
	}
	pkt->ip->ttl--;
	pkt->ip->check = ~fold16((__u16)~pkt->ip->check + bpf_htons(0xfeff));
	return 0;
}

/* Returns the address of the upstream of a line; NULL if there is none. */
static __always_inline const __be32 *line_address(const struct line *line, __u32 index, const bool ipv6)
{
	const struct upstream *upstream;

	if (!ipv6)
		return &line->destination;
	upstream = bpf_map_lookup_elem(&upstreams, &index);
	return upstream ? upstream->address : NULL;
}

/*
 * Returns true unless a packet comes from its upstream's own address; as is_martian_rewrite(), which reads
 * that as the packet's destination.
 */
static __always_inline bool is_from_another(const struct pkt *pkt, const __be32 *address, const bool ipv6)
{
	return address && !is_end(source_of(pkt, ipv6), address, ipv6);
}

/* Lowers the TTL of a packet and puts it into the outer headers of a line. Returns false on failure. */
static __always_inline bool enter_tunnel(struct __sk_buff *skb, const struct pkt *pkt,
					 const struct line *line, const __be32 *address, const bool gue,
					 const bool ipv6)
{
	const __u32 length = tunnel_length(gue, ipv6);
	union {
		struct outer4 outer4;
		struct outer6 outer6;
	} outer;
	struct ethhdr *eth;
	__u64 sum;

	if (ipv6)
		fill_outer6(&outer.outer6, pkt, gue, line->source6, address);
	else
		fill_outer4(&outer.outer4, pkt, gue, line->source4, address[0]);
	sum = lower_ttl(pkt, ipv6) + sum_words(&outer, length);
	if (!make_room(skb, gue, ipv6))
		return false;
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) + length > data_end(skb))
		return false;
	copy_macs(eth, line->macs);
	__builtin_memcpy((__be32 *)(eth + 1), &outer, length);
	if (ip_summed(skb) == CHECKSUM_COMPLETE)
		bpf_csum_update(skb, fold32(sum));
	return true;
}

static __always_inline void leave_by_link(struct __sk_buff *skb, const struct pkt *pkt,
					  const struct line *line, const bool ipv6)
{
	__u64 sum = lower_ttl(pkt, ipv6);

	copy_macs(pkt->eth, line->macs);
	if (ipv6 && ip_summed(skb) == CHECKSUM_COMPLETE)
		bpf_csum_update(skb, sum);
}

static __always_inline bool leave_direct(struct __sk_buff *skb, const struct pkt *pkt,
					 const struct line *line, const __be32 *address, const bool ipv6)
{
	if (EXTRA(tunnels) && line->via == VIA_GUE)
		return enter_tunnel(skb, pkt, line, address, true, ipv6);
	if (EXTRA(tunnels) && line->via == VIA_IPIP)
		return enter_tunnel(skb, pkt, line, address, false, ipv6);
	leave_by_link(skb, pkt, line, ipv6);
	return true;
}

static __always_inline int direct_fast(struct __sk_buff *skb, __u32 index, __u32 sender_table,
				       const bool ipv6)
{
	struct line *line = get_line(index);
	const __be32 *address;
	struct pkt pkt;

	if (!line || !locate_plain(skb, &pkt, ipv6))
		return ACTION_SLOW;
	address = line_address(line, index, ipv6);
	if (!is_from_another(&pkt, address, ipv6) || (skb->vlan_present && bpf_skb_vlan_pop(skb)))
		return ACTION_SLOW;
	if (EXTRA(sender_tables) && sender_table)
		count_rule_sender(skb, pkt.packed, sender_table);
	if (!locate_plain(skb, &pkt, ipv6) || !leave_direct(skb, &pkt, line, address, ipv6)) {
		count_not_copied(skb, index);
		return TC_ACT_SHOT;
	}
	count_sent(line, 1, skb->len);
	return bpf_redirect(line->ifindex, 0);
}

/*
 * Sends a plain datagram to the upstream of a line that has just been valid, and counts its sender in a
 * table, if it has one. Returns the action of the program, or ACTION_SLOW. Global functions, for the stack of
 * the fast path.
 */
__noinline int send_direct4(struct __sk_buff *skb, __u32 index, __u32 sender_table)
{
	return EXTRA(direct) ? direct_fast(skb, index, sender_table, false) : ACTION_SLOW;
}

__noinline int send_direct6(struct __sk_buff *skb, __u32 index, __u32 sender_table)
{
	return EXTRA(direct) && features.ipv6 ? direct_fast(skb, index, sender_table, true) : ACTION_SLOW;
}

#endif
