/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The two ways out: the packet itself or a copy of it, whole or in pieces. */
#ifndef UDPLB_XMIT_H
#define UDPLB_XMIT_H

/* What became of a packet, in one number: verdict, what the program is to return, the MTU that it does not
 * fit. */
#define SENT(verdict, action, mtu) ((__u32)(verdict) | (__u32)(__u8)(action) << 8 | (__u32)(mtu) << 16)
#define SENT_VERDICT(sent) ((sent)&0xff)
#define SENT_ACTION(sent) ((__s8)((sent) >> 8 & 0xff))
#define SENT_MTU(sent) ((sent) >> 16)

/*
 * Sends a copy, or as many fragments of it as `sending` says, for the MTU of the way, and leaves the packet
 * as it came: every byte, and skb->csum. Returns false where it cannot be left so.
 */
static __always_inline bool copy(struct __sk_buff *skb, __u32 layout, struct packet *packet,
				 const struct sending *sending, enum verdict *verdict)
{
	bool sent;

	if (sending->pieces)
		sent = recirculate(skb, layout, sending->upstream, sending->way.mtu, sending->pieces);
	else if (!sending->way.resolved)
		sent = recirculate(skb, layout, sending->upstream, 0, 1);
	else
		sent = features.asking || !bpf_clone_redirect(skb, sending->way.ifindex, 0);
	if (!sent)
		*verdict = VERDICT_CLONE_FAILED;
	if (sending->checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, ~sending->csum);
	if (!locate(skb, layout, packet))
		return false;
	restore(skb, layout, packet, &sending->original);
	return true;
}

/*
 * Sends the packet, or a copy of it, by what next_hop() said. `action` is what the program is to return: to
 * drop even what there is only a copy of, where the packet cannot be left as it came.
 */
static __always_inline enum verdict send_on(struct __sk_buff *skb, __u32 layout, struct packet *packet,
					    struct sending *sending, enum verdict verdict, int *action)
{
	bool gives = layout & LAYOUT_GIVE && !sending->pieces;

	if (!gives)
		save(skb, layout, packet, &sending->original);
	/* what is addressed to a group the kernel does not give a neighbour's address; nor is there one yet
	 */
	if (!gives || sending->way.resolved || packet->eth->h_dest[0] & 1)
		copy_macs(packet->eth, sending->way.frame);
	sending->checksum = checksum_of(skb, layout);
	sending->csum = rewrite(skb, layout, packet, sending->checksum, &sending->label);
	if (sending->checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, sending->csum);
	if (layout & LAYOUT_TRACED)
		trace_frame(skb);
	if (gives) {
		*action = give(skb, sending);
		return verdict;
	}
	if (!copy(skb, layout, packet, sending, &verdict))
		*action = TC_ACT_SHOT;
	return verdict;
}

static __always_inline bool is_ttl_spent(const struct packet *packet)
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
		if (!upstream->twin)
			return 0;
		came = identification_of(skb, layout);
		identification = !packet->is_ipv6 ? bpf_ntohs(packet->ip->id) : came ? bpf_ntohl(*came) : 0;
	}
	return identification + upstream->twin * IDENTIFICATION_STEP;
}

/* False where the source that is asked for is not known. */
static __always_inline bool write_label(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
					const struct upstream *upstream, __u32 identification,
					struct label *label)
{
	const __u32 offset = upstream->source == SOURCE_VIP ? 1 : 0;

	__builtin_memcpy(label->destination, upstream->address, sizeof(label->destination));
	label->port = upstream->port;
	label->identification = new_identification(skb, layout, packet, upstream, identification);
	if (upstream->source == SOURCE_EGRESS)
		return egress_address(upstream, label->source);
	if (packet->is_ipv6)
		__builtin_memcpy(label->source, offset ? &packet->ip6->daddr : &packet->ip6->saddr,
				 sizeof(label->source));
	else
		label->source[0] = offset ? packet->ip->daddr : packet->ip->saddr;
	return true;
}

/* Gives the fragments of a whole packet an identification of their own, where several senders are one. */
static __always_inline void identify_pieces(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
					    const struct upstream *upstream, struct label *label)
{
	if (!(layout & (LAYOUT_FIRST | LAYOUT_LATER)))
		label->identification =
			new_identification(skb, layout | LAYOUT_FIRST, packet, upstream,
					   upstream->source == SOURCE_PRESERVE ? 0 : next_identification());
}

/* By the next hop: the packet or a copy of it, and what is too large and may be cut in pieces. */
static __always_inline enum verdict send_to(struct __sk_buff *skb, __u32 layout, struct packet *packet,
					    const struct upstream *upstream, struct sending *sending,
					    int *action)
{
	enum verdict verdict;

	sending->upstream = upstream->id;
	sending->own = upstream->source == SOURCE_EGRESS;
	sending->pieces = 0;
	verdict = next_hop(skb, packet, ip_length(skb, layout, packet), sending);
	if (verdict == VERDICT_MTU && is_sent(sending->way.verdict) &&
	    (sending->pieces = pieces_of(skb, layout, sending->way.mtu))) {
		verdict = sending->way.verdict;
		if (!locate(skb, layout, packet))
			return VERDICT_CLONE_FAILED;
		identify_pieces(skb, layout, packet, upstream, &sending->label);
	}
	if (!is_sent(verdict))
		return verdict;
	return send_on(skb, layout, packet, sending, verdict, action);
}

/*
 * Sends a packet, or a copy of it, to the upstream with that index, and counts it there.
 * `identification` is for fragments whose senders merge. Returns SENT().
 */
__noinline __u32 send(struct __sk_buff *skb, __u32 index, __u32 layout, __u32 identification)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	int action = layout & LAYOUT_GIVE ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	struct sending *sending = get_sending();
	enum verdict verdict;
	struct packet packet;
	__u32 sent;

	if (!upstream || !sending)
		return SENT(VERDICT_NO_UPSTREAM, action, 0);
	if (!locate(skb, layout, &packet) && (!pull(skb, LAYOUT_MOST) || !locate(skb, layout, &packet))) {
		verdict = VERDICT_CLONE_FAILED;
	} else if (is_ttl_spent(&packet)) {
		verdict = VERDICT_TTL;
	} else if (!write_label(skb, layout, &packet, upstream, identification, &sending->label)) {
		verdict = VERDICT_NO_ROUTE;
	} else if (leaves_as_martian(layout)) {
		verdict = VERDICT_MARTIAN;
	} else {
		verdict = send_to(skb, layout, &packet, upstream, sending, &action);
	}
	sent = SENT(verdict, action, verdict == VERDICT_MTU ? sending->way.mtu : 0);
	count_aside(skb, layout, 0, upstream->id, verdict);
	if (layout & LAYOUT_TRACED)
		end_trace(upstream->id, verdict);
	return sent;
}

#endif
