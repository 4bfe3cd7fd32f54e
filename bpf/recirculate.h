/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A copy that cannot be sent at once comes in a second time, by the interface that the packet came in by: the
 * copy itself, and not the packet, can then be cut, or given to the kernel's neighbour table. Its headers are
 * rewritten; what else is to be known is in skb->cb, so that another generation may finish it.
 */
#ifndef UDPLB_RECIRCULATE_H
#define UDPLB_RECIRCULATE_H

#define RECIRCULATE_MAGIC 0x75647062

/* The words of skb->cb. */
enum cb_word {
	CB_MAGIC,
	CB_SECRET,   /* nobody but the program marks packets */
	CB_UPSTREAM, /* its id, and RECIRCULATED_OWN */
	CB_PACKET,
	CB_FRAGMENT, /* its number, and the MTU in the lower half; 0: the whole packet */
};

/* See `own` of struct sending; no id is as large. */
#define CB_EGRESS_SOURCE (1U << 31)

/* Returned by resume() for a packet that has not come in again. */
#define ACTION_NONE 101

static __always_inline void copy_words(__u32 *to, const __u32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
	to[4] = from[4];
}

/* Has a copy come in again, or with `mtu` each of its pieces. Returns false where one was not taken. */
__noinline __u32 recirculate(struct __sk_buff *skb, __u32 layout, __u32 upstream, __u32 mtu, __u32 fragments)
{
	const struct sequences *sequences = get_sequences();
	struct xmit *xmit = get_xmit();
	bool taken = true;
	__u32 fragment;

	if (!sequences || !xmit || features.dry_run)
		return features.dry_run;
	copy_words(xmit->cb, skb->cb);
	skb->cb[CB_MAGIC] = RECIRCULATE_MAGIC;
	skb->cb[CB_SECRET] = sequences->secret[0];
	skb->cb[CB_UPSTREAM] = xmit->egress_source ? upstream | CB_EGRESS_SOURCE : upstream;
	skb->cb[CB_PACKET] = layout;
	for (fragment = 0; taken && fragment < MAX_FRAGMENTS && fragment < fragments; fragment++) {
		skb->cb[CB_FRAGMENT] = fragment << 16 | mtu;
		taken = !bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	}
	copy_words(skb->cb, xmit->cb);
	return taken;
}

/* The label that a rewritten packet bears. */
static __always_inline void read_rewrite(const struct packet *packet, struct rewrite *rw)
{
	__builtin_memset(rw, 0, sizeof(*rw));
	if (packet->is_ipv6) {
		__builtin_memcpy(rw->source, &packet->ip6->saddr, sizeof(rw->source));
		__builtin_memcpy(rw->destination, &packet->ip6->daddr, sizeof(rw->destination));
	} else {
		rw->source[0] = packet->ip->saddr;
		rw->destination[0] = packet->ip->daddr;
	}
}

/* Sends a copy that has come in again. Returns the verdict; what was sent has been counted before. */
static __always_inline enum verdict xmit_recirculated(struct __sk_buff *skb, __u32 layout, __u32 upstream,
						      int *action)
{
	struct xmit *xmit = get_xmit();
	enum verdict verdict;
	struct packet packet;

	if (!xmit ||
	    (!locate(skb, layout, &packet) && (!pull(skb, LAYOUT_MOST) || !locate(skb, layout, &packet))))
		return VERDICT_CLONE_FAILED;
	xmit->upstream = upstream & ~CB_EGRESS_SOURCE;
	xmit->egress_source = upstream & CB_EGRESS_SOURCE;
	read_rewrite(&packet, &xmit->rewrite);
	verdict = resolve_nexthop(skb, &packet, ip_length(skb, layout, &packet), xmit);
	if (!is_sent(verdict))
		return verdict;
	copy_macs(packet.eth, xmit->hop.macs);
	xmit->checksum = checksum_state(skb, layout);
	*action = redirect(skb, xmit);
	return verdict;
}

static __always_inline bool is_recirculated(struct __sk_buff *skb)
{
	const struct sequences *sequences = get_sequences();

	return sequences && skb->cb[CB_SECRET] == (__u32)sequences->secret[0];
}

/* The whole way of a copy that has come in again; what else bears the mark is no copy. */
__noinline int resume_recirculated(struct __sk_buff *skb, __u32 l2)
{
	__u32 upstream = skb->cb[CB_UPSTREAM], layout = skb->cb[CB_PACKET];
	__u32 fragment = skb->cb[CB_FRAGMENT] >> 16, mtu = skb->cb[CB_FRAGMENT] & 0xffff;
	enum verdict verdict = VERDICT_CLONE_FAILED;
	int action = TC_ACT_SHOT;

	if (!is_recirculated(skb))
		return ACTION_NONE;
	skb->cb[CB_MAGIC] = 0;
	if ((l2 || push_ethernet(skb)) && (!mtu || make_fragment(skb, layout, fragment, mtu)))
		verdict =
			xmit_recirculated(skb, fragment ? layout | LAYOUT_LATER : layout, upstream, &action);
	if (!is_sent(verdict))
		count_verdict(skb, 0, 0, upstream & ~CB_EGRESS_SOURCE, verdict);
	return action;
}

#endif
