/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The two ways out: the packet itself or a copy of it; and what is counted for it. */
#ifndef UDPLB_FORWARD_H
#define UDPLB_FORWARD_H

/* What became of a packet, in one number: verdict, what the program is to return, the MTU that it does not
 * fit. */
#define SENT(verdict, action, mtu) ((__u32)(verdict) | (__u32)(__u8)(action) << 8 | (__u32)(mtu) << 16)
#define SENT_VERDICT(sent) ((sent)&0xff)
#define SENT_ACTION(sent) ((__s8)((sent) >> 8 & 0xff))
#define SENT_MTU(sent) ((sent) >> 16)

/* The segments of a GSO packet but the first, each of which has headers of its own. */
static __noinline void count_segments(struct __sk_buff *skb, __u32 layout, __u32 bytes,
				      struct counter *counter)
{
	__u32 headers = segment_headers(skb, layout), segments = skb->gso_segs;

	/* a guest's packet comes without their number */
	if (!segments && bytes > headers)
		segments = (bytes - headers + skb->gso_size - 1) / skb->gso_size;
	if (segments < 2)
		return;
	counter->packets += segments - 1;
	counter->bytes += (__u64)(segments - 1) * headers;
}

/* `tags`: what is in the frame that the layout does not know of, in bytes. */
static __always_inline void count(struct __sk_buff *skb, __u32 layout, __u32 tags, __u32 id,
				  enum verdict which)
{
	__u32 chunk = id / COUNTERS_PER_CHUNK, index = id % COUNTERS_PER_CHUNK, bytes = skb->len - tags;
	void *inner = bpf_map_lookup_elem(&counters, &chunk);
	struct counters *counters = inner ? bpf_map_lookup_elem(inner, &index) : NULL;
	struct counter *counter;

	if (!counters || features.asking || which >= COUNTERS)
		return;
	counter = &counters->of[which];
	counter->packets++;
	counter->bytes += bytes;
	if (skb->gso_size && layout)
		count_segments(skb, layout, bytes, counter);
}

/* Out of line: off the main path, and the verifier need not go on from each of its ends. */
__noinline __u32 count_aside(struct __sk_buff *skb, __u32 layout, __u32 tags, __u32 id, __u32 which)
{
	count(skb, layout, tags, id, which);
	return 0;
}

/*
 * Ends CHECKSUM_COMPLETE, which no other helper does. bpf_redirect_neigh() takes a header off and leaves it
 * in the sum; a receiver on this host then takes another one out of it, and drops the packet if the sum is
 * not the hardware's: behind a tunnel it is not.
 */
static __always_inline void forget_sum(struct __sk_buff *skb)
{
	__u32 length = skb->len;

	if (!skb->gso_size && !bpf_skb_change_tail(skb, length + 1, 0))
		bpf_skb_change_tail(skb, length, 0);
}

/* Gives the packet away, which says already what it is to say. */
static __always_inline int give(struct __sk_buff *skb, struct sending *sending, enum verdict verdict)
{
	struct bpf_redir_neigh *neighbour = &sending->neighbour;
	const struct way *way = &sending->way;

	if (verdict == VERDICT_FORWARDED)
		return bpf_redirect(way->ifindex, 0);
	if (sending->checksum == CHECKSUM_OF_FRAME)
		forget_sum(skb);
	/* the kernel asks for the neighbour and keeps the packet meanwhile */
	neighbour->nh_family = way->family;
	__builtin_memcpy(neighbour->ipv6_nh, way->gateway, sizeof(neighbour->ipv6_nh));
	return bpf_redirect_neigh(way->ifindex, neighbour, sizeof(*neighbour), 0);
}

/* Sends a copy, and leaves the packet as it came: every byte, and skb->csum. False where it cannot be left
 * so.
 */
static __always_inline bool copy(struct __sk_buff *skb, __u32 layout, struct packet *packet,
				 const struct sending *sending, enum verdict *verdict)
{
	if (!features.asking && bpf_clone_redirect(skb, sending->way.ifindex, 0))
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
	bool gives = layout & LAYOUT_GIVE;

	if (!gives) {
		if (verdict == VERDICT_NO_NEIGHBOUR)
			return verdict;
		save(skb, layout, packet, &sending->original);
	}
	/* what is addressed to a group the kernel does not give a neighbour's address; nor is there one yet
	 */
	if (!gives || verdict == VERDICT_FORWARDED || packet->eth->h_dest[0] & 1)
		copy_macs(packet->eth, sending->way.frame);
	sending->checksum = checksum_of(skb, layout);
	sending->csum = rewrite(skb, layout, packet, sending->checksum, &sending->label);
	if (sending->checksum == CHECKSUM_OF_FRAME)
		bpf_csum_update(skb, sending->csum);
	if (layout & LAYOUT_TRACED)
		trace_frame(skb);
	if (gives) {
		*action = give(skb, sending, verdict);
		return VERDICT_FORWARDED;
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
	} else {
		verdict = next_hop(skb, layout, &packet, upstream, index, sending);
		if (verdict != VERDICT_MTU && verdict != VERDICT_NO_ROUTE)
			verdict = send_on(skb, layout, &packet, sending, verdict, &action);
	}
	sent = SENT(verdict, action, verdict == VERDICT_MTU ? sending->way.mtu : 0);
	count(skb, layout, 0, upstream->id, verdict);
	if (layout & LAYOUT_TRACED)
		end_trace(upstream->id, verdict);
	return sent;
}

#endif
