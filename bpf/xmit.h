/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Sends a packet to an upstream: the packet itself or a clone of it, whole or in fragments. */
#ifndef UDPLB_XMIT_H
#define UDPLB_XMIT_H

/* Result of sending a clone of a packet and restoring the packet. */
enum copied {
	COPIED_BROKEN, /* the packet cannot be restored */
	COPIED_SENT,
	COPIED_NOT, /* no clone could be sent */
};

/*
 * Result of sending a packet: the verdict, the action that the program returns, and with VERDICT_MTU the MTU
 * that the packet exceeds (0: unknown). In one word, because a global function returns a scalar.
 */
static __always_inline __u32 xmit_result(enum verdict verdict, int action, __u32 mtu)
{
	return (__u32)verdict | (__u32)(__u8)action << 8 | mtu << 16;
}

static __always_inline enum verdict xmit_verdict(__u32 result)
{
	return result & 0xff;
}

static __always_inline int xmit_action(__u32 result)
{
	return (__s8)(result >> 8 & 0xff);
}

static __always_inline __u32 xmit_mtu(__u32 result)
{
	return result >> 16;
}

/* Returns the action of the program for a packet that is not redirected. */
static __always_inline int unsent_action(__u32 packed)
{
	return packed & PKT_F_REDIRECT ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/*
 * Sends a clone of the rewritten packet, or a clone for each of xmit->fragments, and restores the packet:
 * every byte, and skb->csum. Returns false if the packet cannot be restored.
 */
static __always_inline bool clone_packet(struct __sk_buff *skb, struct pkt *pkt, const struct xmit *xmit,
					 enum verdict *verdict)
{
	__u32 upstream = xmit->egress_source ? xmit->upstream | CB_EGRESS_SOURCE : xmit->upstream;
	bool sent;

	if (xmit->fragments)
		sent = recirculate(skb, pkt->packed, upstream, xmit->hop.mtu, xmit->fragments);
	else if (!xmit->hop.resolved)
		sent = recirculate(skb, pkt->packed, upstream, 0, 1);
	else
		sent = features.dry_run || !bpf_clone_redirect(skb, xmit->hop.ifindex, 0);
	if (!sent)
		*verdict = VERDICT_CLONE_FAILED;
	if (xmit->checksum == CSUM_COMPLETE)
		bpf_csum_update(skb, ~xmit->csum_delta);
	if (!pkt_locate(skb, pkt))
		return false;
	restore_headers(skb, pkt, &xmit->saved);
	return true;
}

/*
 * Rewrites the packet for xmit->hop and sends it (PKT_F_REDIRECT) or a clone of it; `verdict` is the one of
 * its next hop. Returns xmit_result(): TC_ACT_SHOT for a packet that was cloned and cannot be restored. A
 * global function so that the paths to the next hop do not multiply those that the verifier explores here.
 */
__noinline __u32 transmit(struct __sk_buff *skb, __u32 packed, __u32 found)
{
	struct pkt pkt = pkt_of(packed);
	enum verdict verdict = found;
	struct xmit *xmit = get_xmit();
	bool redirects;

	if (!xmit || !pkt_locate(skb, &pkt))
		return xmit_result(VERDICT_CLONE_FAILED, unsent_action(packed), 0);
	redirects = pkt_has(&pkt, PKT_F_REDIRECT) && !xmit->fragments;
	if (!redirects)
		save_headers(skb, &pkt, &xmit->saved);
	/*
	 * bpf_redirect_neigh() drops frames to a group's MAC address; before it resolves one, hop.macs is
	 * zero
	 */
	if (!redirects || xmit->hop.resolved || pkt.eth->h_dest[0] & 1)
		copy_macs(pkt.eth, xmit->hop.macs);
	xmit->checksum = checksum_state(skb, &pkt);
	xmit->csum_delta = rewrite_headers(skb, &pkt, xmit->checksum, &xmit->rewrite,
					   is_direct(xmit) ? xmit->kept : xmit->rewrite.destination);
	if (xmit->checksum == CSUM_COMPLETE)
		bpf_csum_update(skb, xmit->csum_delta);
	if (is_tunnel(xmit) && (!fill_outer(skb, packed) || !push_outer(skb, pkt_has(&pkt, PKT_F_IPV6))))
		return xmit_result(VERDICT_CLONE_FAILED, unsent_action(packed), 0);
	if (pkt_has(&pkt, PKT_F_TRACED))
		trace_frame(skb);
	if (redirects)
		return xmit_result(verdict, redirect(skb, xmit), 0);
	if (!clone_packet(skb, &pkt, xmit, &verdict))
		return xmit_result(verdict, TC_ACT_SHOT, 0);
	return xmit_result(verdict, unsent_action(packed), 0);
}

/* Returns the MTU of the next hop without outer headers, in bytes; 0: unknown. */
static __always_inline __u32 inner_mtu(const struct xmit *xmit, bool ipv6)
{
	__u32 outer = outer_length(xmit, ipv6);

	return xmit->hop.mtu > outer ? xmit->hop.mtu - outer : 0;
}

static __always_inline bool is_ttl_expired(const struct pkt *pkt)
{
	return (pkt->is_ipv6 ? pkt->ip6->hop_limit : pkt->ip->ttl) <= 1;
}

/*
 * Distance between the identifications of duplicates. The golden section of both 32 and 16 bits: each
 * multiple is far from all others.
 */
#define IDENTIFICATION_STEP 0x9e379e37

/*
 * Returns the identification of an outgoing fragment; 0: it stays as it is. Receivers tell fragments of two
 * copies apart by it alone, and so fragments of two senders that leave with the same source.
 */
static __always_inline __u32 new_identification(struct __sk_buff *skb, const struct pkt *pkt,
						const struct upstream *upstream, __u32 identification)
{
	const __be32 *current;

	if (!pkt_has(pkt, PKT_F_FIRST_FRAGMENT | PKT_F_LATER_FRAGMENT))
		return 0;
	if (upstream->source == SOURCE_PRESERVE) {
		if (!upstream->duplicate)
			return 0;
		current = ipv6_fragment_id(skb, pkt);
		identification = !pkt->is_ipv6 ? bpf_ntohs(pkt->ip->id) : current ? bpf_ntohl(*current) : 0;
	}
	return identification + upstream->duplicate * IDENTIFICATION_STEP;
}

/* Fills in the new headers of an upstream's answer: the client was told to expect it from elsewhere. */
static __always_inline void fill_answer(const struct pkt *pkt, const struct upstream *answers,
					struct rewrite *rw)
{
	__builtin_memcpy(rw->source, answers->address, sizeof(rw->source));
	rw->source_port = answers->port;
	rw->port = 0;
	if (pkt->is_ipv6)
		__builtin_memcpy(rw->destination, &pkt->ip6->daddr, sizeof(rw->destination));
	else
		rw->destination[0] = pkt->ip->daddr;
}

/* Fills in the source that the configuration names. Returns false if it is missing. */
static __always_inline bool fill_fixed_source(const struct upstream *upstream, struct rewrite *rw)
{
	__u32 index = upstream->linked;
	const struct upstream *source = bpf_map_lookup_elem(&upstreams, &index);

	if (!source)
		return false;
	__builtin_memcpy(rw->source, source->address, sizeof(rw->source));
	rw->source_port = source->port;
	return true;
}

/* Returns true if the flow has the new headers. In a dry run a new one is not made, and only drafted. */
static __always_inline bool uses_flow(const struct upstream *upstream)
{
	const struct xmit *xmit = get_xmit();

	return EXTRA(flows) && upstream->source >= SOURCE_FLOW && !(features.dry_run && xmit && !xmit->flow);
}

/*
 * Fills in the new headers for an upstream. Returns false if its egress address is not known, or if the flow
 * has ended.
 */
static __always_inline bool fill_rewrite(struct __sk_buff *skb, const struct pkt *pkt,
					 const struct upstream *upstream, __u32 identification,
					 struct rewrite *rw)
{
	const bool from_vip = upstream->source == SOURCE_VIP;

	rw->identification = new_identification(skb, pkt, upstream, identification);
	if (EXTRA(origins) && upstream->source == SOURCE_ORIGIN) {
		fill_answer(pkt, upstream, rw);
		return true;
	}
	if (uses_flow(upstream))
		return fill_flow_rewrite(upstream->source == SOURCE_FLOW_VIP, pkt->is_ipv6);
	__builtin_memcpy(rw->destination, upstream->address, sizeof(rw->destination));
	rw->port = upstream->port;
	rw->source_port = 0;
	if (EXTRA(sources) && upstream->source == SOURCE_FIXED)
		return fill_fixed_source(upstream, rw);
	if (EXTRA(flows) && features.dry_run && upstream->source == SOURCE_FLOW)
		return fill_drafted_source(rw);
	if (upstream->source == SOURCE_EGRESS || (EXTRA(flows) && upstream->source == SOURCE_FLOW))
		return egress_address(upstream, rw->source);
	if (pkt->is_ipv6)
		__builtin_memcpy(rw->source, from_vip ? &pkt->ip6->daddr : &pkt->ip6->saddr,
				 sizeof(rw->source));
	else
		rw->source[0] = from_vip ? pkt->ip->daddr : pkt->ip->saddr;
	return true;
}

/* Gives the fragments of a whole packet a new identification, if several senders leave with one source. */
static __always_inline void identify_fragments(struct __sk_buff *skb, const struct pkt *pkt,
					       const struct upstream *upstream, struct rewrite *rw)
{
	struct pkt first = *pkt;

	if (pkt_has(pkt, PKT_F_FIRST_FRAGMENT | PKT_F_LATER_FRAGMENT))
		return;
	first.packed |= PKT_F_FIRST_FRAGMENT;
	rw->identification = new_identification(
		skb, &first, upstream, upstream->source == SOURCE_PRESERVE ? 0 : next_identification());
}

/* Resolves the next hop of a packet with new headers, and sets xmit->fragments. Returns the verdict. */
static __always_inline enum verdict prepare_nexthop(struct __sk_buff *skb, struct pkt *pkt,
						    const struct upstream *upstream, struct xmit *xmit)
{
	enum verdict verdict;

	xmit->upstream = upstream->id;
	xmit->egress_source = upstream->source == SOURCE_EGRESS || upstream->source == SOURCE_FLOW;
	xmit->fragments = 0;
	verdict = resolve_nexthop(skb, pkt, ip_length(skb, pkt) + outer_length(xmit, pkt->is_ipv6), xmit);
	if (verdict == VERDICT_MTU && is_sent(xmit->hop.verdict) && !is_direct(xmit) &&
	    (xmit->fragments = count_fragments(skb, pkt->packed, xmit->hop.mtu))) {
		verdict = xmit->hop.verdict;
		if (!pkt_locate(skb, pkt))
			return VERDICT_CLONE_FAILED;
		identify_fragments(skb, pkt, upstream, &xmit->rewrite);
	}
	/* a later fragment follows the first one, though the upstream has been drained since */
	if (verdict == VERDICT_FORWARDED && !xmit->fragments && !pkt_has(pkt, PKT_F_LATER_FRAGMENT)) {
		if (EXTRA(flows) && upstream->source == SOURCE_FLOW_VIP)
			fill_return_line(skb, pkt->packed, ip_length(skb, pkt));
		else if (!is_remembered(xmit, ip_length(skb, pkt)))
			fill_line(ip_length(skb, pkt), pkt->is_ipv6);
	}
	return verdict;
}

/*
 * Fills in new headers and next hop of a packet to the upstream at an index. Returns the verdict. A global
 * function for the same reason as transmit().
 */
__noinline __u32 prepare_xmit(struct __sk_buff *skb, __u32 index, __u32 packed, __u32 identification)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();

	if (!upstream || !xmit || !pkt_pull(skb, &pkt))
		return VERDICT_CLONE_FAILED;
	if (is_ttl_expired(&pkt))
		return VERDICT_TTL;
	if (!fill_rewrite(skb, &pkt, upstream, identification, &xmit->rewrite) ||
	    (is_direct(xmit) && !keep_destination(skb, packed, index)))
		return uses_flow(upstream) ? VERDICT_NO_FLOW : VERDICT_NO_ROUTE;
	if (is_martian_rewrite(packed))
		return VERDICT_MARTIAN;
	return prepare_nexthop(skb, &pkt, upstream, xmit);
}

/*
 * Sends the packet (PKT_F_REDIRECT) or a clone of it to the upstream at an index, and counts it there.
 * `identification` is for fragments of several senders with one source. Returns xmit_result().
 */
__noinline __u32 xmit_upstream(struct __sk_buff *skb, __u32 index, __u32 packed, __u32 identification)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	const struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();
	__u32 verdict, result;

	if (!upstream || !xmit)
		return xmit_result(VERDICT_NO_UPSTREAM, unsent_action(packed), 0);
	xmit->index = upstream->line;
	xmit->via = upstream->via;
	verdict = prepare_xmit(skb, index, packed, identification);
	if (is_sent(verdict))
		result = transmit(skb, packed, verdict);
	else
		result = xmit_result(verdict, unsent_action(packed),
				     verdict == VERDICT_MTU ? inner_mtu(xmit, pkt_has(&pkt, PKT_F_IPV6)) : 0);
	count_xmit(skb, &pkt, upstream, xmit_verdict(result));
	trace_verdict(&pkt, upstream->id, xmit_verdict(result));
	return result;
}

#endif
