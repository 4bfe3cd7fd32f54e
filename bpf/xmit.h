/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The two ways out: the packet itself or a copy of it, whole or in pieces. */
#ifndef UDPLB_XMIT_H
#define UDPLB_XMIT_H

/* What became of a packet, in one number: verdict, what the program is to return, the MTU that it does not
 * fit. */
#define xmit_result(verdict, action, mtu) ((__u32)(verdict) | (__u32)(__u8)(action) << 8 | (__u32)(mtu) << 16)
#define xmit_verdict(sent) ((sent)&0xff)
#define xmit_action(sent) ((__s8)((sent) >> 8 & 0xff))
#define xmit_mtu(sent) ((sent) >> 16)

/*
 * Sends a copy, or as many fragments of it as `sending` says, for the MTU of the way, and leaves the packet
 * as it came: every byte, and skb->csum. Returns false where it cannot be left so.
 */
static __always_inline bool clone_packet(struct __sk_buff *skb, __u32 layout, struct packet *packet,
					 const struct xmit *xmit, enum verdict *verdict)
{
	bool sent;

	if (xmit->fragments)
		sent = recirculate(skb, layout, xmit->upstream, xmit->hop.mtu, xmit->fragments);
	else if (!xmit->hop.resolved)
		sent = recirculate(skb, layout, xmit->upstream, 0, 1);
	else
		sent = features.dry_run || !bpf_clone_redirect(skb, xmit->hop.ifindex, 0);
	if (!sent)
		*verdict = VERDICT_CLONE_FAILED;
	if (xmit->checksum == CSUM_COMPLETE)
		bpf_csum_update(skb, ~xmit->csum_delta);
	if (!locate(skb, layout, packet))
		return false;
	restore_headers(skb, layout, packet, &xmit->saved);
	return true;
}

/*
 * Sends the packet, or a copy of it, by what next_hop() said. `action` is what the program is to return: to
 * drop even what there is only a copy of, where the packet cannot be left as it came.
 */
static __always_inline enum verdict transmit(struct __sk_buff *skb, __u32 layout, struct packet *packet,
					     struct xmit *xmit, enum verdict verdict, int *action)
{
	bool redirects = layout & LAYOUT_GIVE && !xmit->fragments;

	if (!redirects)
		save_headers(skb, layout, packet, &xmit->saved);
	/* what is addressed to a group the kernel does not give a neighbour's address; nor is there one yet
	 */
	if (!redirects || xmit->hop.resolved || packet->eth->h_dest[0] & 1)
		copy_macs(packet->eth, xmit->hop.macs);
	xmit->checksum = checksum_state(skb, layout);
	xmit->csum_delta = rewrite_headers(skb, layout, packet, xmit->checksum, &xmit->rewrite);
	if (xmit->checksum == CSUM_COMPLETE)
		bpf_csum_update(skb, xmit->csum_delta);
	if (layout & LAYOUT_TRACED)
		trace_frame(skb);
	if (redirects) {
		*action = redirect(skb, xmit);
		return verdict;
	}
	if (!clone_packet(skb, layout, packet, xmit, &verdict))
		*action = TC_ACT_SHOT;
	return verdict;
}

static __always_inline bool is_ttl_expired(const struct packet *packet)
{
	return (packet->is_ipv6 ? packet->ip6->hop_limit : packet->ip->ttl) <= 1;
}

/* Of 32 bits and of the lower 16, the golden section: what it steps to is far from all before. */
#define IDENTIFICATION_STEP 0x9e379e37

/*
 * By this alone a host tells the fragments of two copies from each other, and from those of other senders
 * that are one for it. 0: what came.
 */
static __always_inline __u32 new_identification(struct __sk_buff *skb, __u32 layout,
						const struct packet *packet, const struct upstream *upstream,
						__u32 identification)
{
	const __be32 *came;

	if (!(layout & (LAYOUT_FIRST | LAYOUT_LATER)))
		return 0;
	if (upstream->source == SOURCE_PRESERVE) {
		if (!upstream->duplicate)
			return 0;
		came = ipv6_fragment_id(skb, layout);
		identification = !packet->is_ipv6 ? bpf_ntohs(packet->ip->id) : came ? bpf_ntohl(*came) : 0;
	}
	return identification + upstream->duplicate * IDENTIFICATION_STEP;
}

/* False where the source that is asked for is not known. */
static __always_inline bool fill_rewrite(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
					 const struct upstream *upstream, __u32 identification,
					 struct rewrite *rw)
{
	const __u32 offset = upstream->source == SOURCE_VIP ? 1 : 0;

	__builtin_memcpy(rw->destination, upstream->address, sizeof(rw->destination));
	rw->port = upstream->port;
	rw->identification = new_identification(skb, layout, packet, upstream, identification);
	if (upstream->source == SOURCE_EGRESS)
		return egress_address(upstream, rw->source);
	if (packet->is_ipv6)
		__builtin_memcpy(rw->source, offset ? &packet->ip6->daddr : &packet->ip6->saddr,
				 sizeof(rw->source));
	else
		rw->source[0] = offset ? packet->ip->daddr : packet->ip->saddr;
	return true;
}

/* Gives the fragments of a whole packet an identification of their own, where several senders are one. */
static __always_inline void identify_fragments(struct __sk_buff *skb, __u32 layout,
					       const struct packet *packet, const struct upstream *upstream,
					       struct rewrite *rw)
{
	if (!(layout & (LAYOUT_FIRST | LAYOUT_LATER)))
		rw->identification =
			new_identification(skb, layout | LAYOUT_FIRST, packet, upstream,
					   upstream->source == SOURCE_PRESERVE ? 0 : next_identification());
}

/* By the next hop: the packet or a copy of it, and what is too large and may be cut in pieces. */
static __always_inline enum verdict xmit_to_nexthop(struct __sk_buff *skb, __u32 layout,
						    struct packet *packet, const struct upstream *upstream,
						    struct xmit *xmit, int *action)
{
	enum verdict verdict;

	xmit->upstream = upstream->id;
	xmit->egress_source = upstream->source == SOURCE_EGRESS;
	xmit->fragments = 0;
	verdict = resolve_nexthop(skb, packet, ip_length(skb, layout, packet), xmit);
	if (verdict == VERDICT_MTU && is_sent(xmit->hop.verdict) &&
	    (xmit->fragments = count_fragments(skb, layout, xmit->hop.mtu))) {
		verdict = xmit->hop.verdict;
		if (!locate(skb, layout, packet))
			return VERDICT_CLONE_FAILED;
		identify_fragments(skb, layout, packet, upstream, &xmit->rewrite);
	}
	if (!is_sent(verdict))
		return verdict;
	return transmit(skb, layout, packet, xmit, verdict, action);
}

/*
 * Sends a packet, or a copy of it, to the upstream with that index, and counts it there.
 * `identification` is for fragments whose senders merge. Returns SENT().
 */
__noinline __u32 xmit_upstream(struct __sk_buff *skb, __u32 index, __u32 layout, __u32 identification)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	int action = layout & LAYOUT_GIVE ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	struct xmit *xmit = get_xmit();
	enum verdict verdict;
	struct packet packet;
	__u32 sent;

	if (!upstream || !xmit)
		return xmit_result(VERDICT_NO_UPSTREAM, action, 0);
	if (!locate(skb, layout, &packet) && (!pull(skb, LAYOUT_MOST) || !locate(skb, layout, &packet))) {
		verdict = VERDICT_CLONE_FAILED;
	} else if (is_ttl_expired(&packet)) {
		verdict = VERDICT_TTL;
	} else if (!fill_rewrite(skb, layout, &packet, upstream, identification, &xmit->rewrite)) {
		verdict = VERDICT_NO_ROUTE;
	} else if (is_martian_rewrite(layout)) {
		verdict = VERDICT_MARTIAN;
	} else {
		verdict = xmit_to_nexthop(skb, layout, &packet, upstream, xmit, &action);
	}
	sent = xmit_result(verdict, action, verdict == VERDICT_MTU ? xmit->hop.mtu : 0);
	count_verdict(skb, layout, 0, upstream->id, verdict);
	if (layout & LAYOUT_TRACED)
		end_trace(upstream->id, verdict);
	return sent;
}

#endif
