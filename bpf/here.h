/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Delivers packets to receivers on this host, which listen at a port of their own. The packet itself goes on
 * up the stack. A clone is recirculated, so that it arrives as the packet did, and the program passes it on
 * unseen: it matches no rule again, whatever the rules are by then.
 */
#ifndef UDPLB_HERE_H
#define UDPLB_HERE_H

/* Recirculates a clone of the rewritten packet with the packet's tags. Returns enum copied. */
__noinline __u32 clone_here(struct __sk_buff *skb, __u32 packed, __u32 upstream);

/* Returns true if the upstream at an index is this host. A global function, for the stack of its callers. */
__noinline __u32 is_upstream_here(__u32 index)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);

	return upstream && upstream->via == VIA_HERE;
}

static __always_inline bool is_here(__u32 index)
{
	return EXTRA(here) && is_upstream_here(index);
}

/* Rewrites the identification of a fragment (0: unchanged). Returns what this adds to the sum of the packet.
 */
static __always_inline __u64 rewrite_identification(struct __sk_buff *skb, const struct pkt *pkt,
						    __u32 identification)
{
	__u64 sum;

	if (!identification)
		return 0;
	if (pkt->is_ipv6)
		return rewrite_ipv6_id(skb, pkt, identification);
	sum = CSUM_REPLACE(__u16, pkt->ip->id, bpf_htons(identification));
	pkt->ip->id = bpf_htons(identification);
	pkt->ip->check = ~fold16((__u16)~pkt->ip->check + sum);
	return 0; /* the header checksum makes up for it */
}

/*
 * Rewrites a packet for a receiver on this host: its port, and the identification of a fragment (0:
 * unchanged). Returns what this adds to skb->csum.
 */
static __always_inline __u32 rewrite_for_here(struct __sk_buff *skb, const struct pkt *pkt, __be16 port,
					      __u32 identification)
{
	const struct rewrite rw = {.port = port};
	enum checksum checksum = checksum_state(skb, pkt);
	__u64 sum = rewrite_identification(skb, pkt, identification);
	__u32 delta;

	if (pkt->has_udp)
		sum += rewrite_udp(pkt->udp, checksum, &rw, 0);
	delta = checksum == CSUM_COMPLETE ? fold32(sum) : 0;
	if (delta)
		bpf_csum_update(skb, delta);
	return delta;
}

/*
 * Delivers a clone of the packet. Its fragments have an identification of their own: this host may reassemble
 * the packet and other clones, too. Stores the action TC_ACT_SHOT if the packet cannot be restored.
 */
static __always_inline enum verdict copy_here(struct __sk_buff *skb, struct pkt *pkt,
					      const struct upstream *upstream, int *action)
{
	struct xmit *xmit = get_xmit();
	__u32 delta, copied;

	if (!xmit)
		return VERDICT_CLONE_FAILED;
	save_headers(skb, pkt, &xmit->saved);
	delta = rewrite_for_here(skb, pkt, upstream->port, new_identification(skb, pkt, upstream, 0));
	if (pkt_has(pkt, PKT_F_TRACED))
		trace_frame(skb);
	copied = clone_here(skb, pkt->packed, upstream->id);
	if (delta)
		bpf_csum_update(skb, ~delta);
	if (copied == COPIED_BROKEN || !pkt_locate(skb, pkt)) {
		*action = TC_ACT_SHOT;
		return VERDICT_CLONE_FAILED;
	}
	restore_headers(skb, pkt, &xmit->saved);
	return copied == COPIED_SENT ? VERDICT_FORWARDED : VERDICT_CLONE_FAILED;
}

/*
 * Delivers the packet (PKT_F_REDIRECT) or a clone of it to the upstream at an index, which is here, and
 * counts it there. Addresses and TTL stay. Returns xmit_result().
 */
__noinline __u32 xmit_here(struct __sk_buff *skb, __u32 index, __u32 packed)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	enum verdict verdict = VERDICT_FORWARDED;
	struct pkt pkt = pkt_of(packed);
	int action = TC_ACT_UNSPEC;

	if (!upstream)
		return xmit_result(VERDICT_NO_UPSTREAM, action, 0);
	if (!pkt_pull(skb, &pkt)) {
		verdict = VERDICT_CLONE_FAILED;
	} else if (!pkt_has(&pkt, PKT_F_REDIRECT)) {
		verdict = copy_here(skb, &pkt, upstream, &action);
	} else {
		rewrite_for_here(skb, &pkt, upstream->port, 0);
		if (pkt_has(&pkt, PKT_F_TRACED))
			trace_frame(skb);
	}
	count_xmit(skb, &pkt, upstream, verdict);
	trace_verdict(&pkt, upstream->id, verdict);
	return xmit_result(verdict, action, 0);
}

#endif
